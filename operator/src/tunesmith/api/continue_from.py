"""Start of a FineTuneJob from a trained adapter."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.api.credentials import SecretReference
from tunesmith.api.model import ApiModel, ResourceName, Rule, StringPattern
from tunesmith.api.uri import BaseModelUri, secret_rule, uri_rules
from tunesmith.storage.schemes import Use, examples

Digest = Annotated[
    str,
    Field(max_length=71),
    StringPattern(r"^sha256:[0-9a-f]{64}$", "a digest is sha256: and 64 hex digits, as in status.artifact.digest"),
]


class FineTuneJobReference(ApiModel):
    """A FineTuneJob in the same namespace."""

    name: ResourceName = Field(
        description="Name of the FineTuneJob. It may not exist yet: the resource that names it waits for it."
    )


class ArtifactReference(ApiModel):
    """A published artifact."""

    rules = (*uri_rules, secret_rule)

    uri: BaseModelUri = Field(
        description=f"Folder of the artifact, which contains tunesmith.json: {examples(Use.BASE_MODEL)}; file:// in a "
        "local run only."
    )
    digest: Digest | None = Field(
        default=None, description="SHA-256 that its tunesmith.json must have. Absent: any artifact at the uri."
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri. Absent: those of the store."
    )


class ContinueFrom(ApiModel):
    """Adapter that training starts from; exactly one field."""

    rules = (
        Rule(
            "has(self.fineTuneJob) != has(self.artifact)",
            "continueFrom must have exactly one of fineTuneJob and artifact: keep one and remove the other",
            lambda self: (self.fine_tune_job is None) != (self.artifact is None),
        ),
    )

    fine_tune_job: FineTuneJobReference | None = Field(
        default=None, description="The artifact of a FineTuneJob. The job waits until that one is Complete."
    )
    artifact: ArtifactReference | None = Field(default=None, description="An artifact, by its location.")
