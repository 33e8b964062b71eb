"""Adapter that training starts from (spec.continueFrom): its files, its method, and its weights in a new adapter.

The files are checked as the agents of pools check them before an engine loads them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.contracts.adapterconfig import adapter_of
from tunesmith.contracts.artifact import (
    MAX_MANIFEST_BYTES,
    Ancestor,
    ArtifactManifest,
    check_files,
    digest_of,
    parse_manifest,
)
from tunesmith.contracts.location import ARTIFACT_MANIFEST
from tunesmith.contracts.parity import PARITY_FILE, Parity
from tunesmith.contracts.safetensors import read_tensors
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES
from tunesmith.contracts.strict_json import parse_object
from tunesmith_trainer.base_model.logits import batch_of_one, mixed_precision
from tunesmith_trainer.errors import AdapterNotFoundError, InvalidSpecError, SelfCheckError
from tunesmith_trainer.methods import weightless
from tunesmith_trainer.methods.conversion import published_config
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft import PeftModel

    from tunesmith.api.continue_from import ContinueFrom
    from tunesmith.api.method import Method
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.methods.config import MethodPlan
    from tunesmith_trainer.methods.targets import Modules
    from tunesmith_trainer.store import Stores

MAX_ANCESTORS = 32
"""Number of adapters that a lineage records."""
_MAX_CONFIG_VALUES = 65_536
_TYPES = frozenset({"BF16", "F16", "F32", "F64", "BOOL", "U8", "I8", "I16", "I32", "I64"})
"""Types of safetensors that an adapter's weights and indices have."""
_VALUES_AT_ONCE = 2**22
_MAX_PARITY_BYTES = 16 * 2**20
_MAX_PROBE_TOKENS = 65_536
"""Highest number of tokens of all recorded prompts and answers; the trainer records some hundreds."""
_FIELD = "spec.continueFrom"
_NOT_CONTINUED = {
    "ADALORA": "its ranks depend on the state of the run that trained it",
    "P_TUNING": "the network that computes its vectors is not part of the artifact",
}
"""Reasons why adapters of some of PEFT's types cannot be continued."""
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type"),
        *("init_lora_weights", "init_weights", "init_ia3_weights", "prompt_tuning_init", "tokenizer_name_or_path"),
        *("prompt_tuning_init_text", "tokenizer_kwargs", "token_dim", "num_transformer_submodules", "num_layers"),
        *("num_attention_heads", "runtime_config", "lora_dropout", "target_modules", "exclude_modules"),
        "fan_in_fan_out",  # follows from the base model and its quantisation
    }
)
"""Keys of adapter_config.json that may differ: they describe the base, act at the start or in training only, or choose
modules, which are compared by their tensors."""
_ROUNDING, _COARSE_ROUNDING = 1e-3, 5e-2
"""Tolerated difference of mean log-probabilities, in nats: in float32, and where weights or products have 16 bits."""


@dataclass(frozen=True)
class StartAdapter:
    """A checked adapter on the local disk.

    Args:
        uri: folder of the artifact.
        digest: digest of its manifest.
        manifest: its manifest.
        folder: local folder with its configuration, weights and expected answers.
    """

    uri: str
    digest: str
    manifest: ArtifactManifest
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapter."""
        config: dict[str, Any] = json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return config

    @property
    def lineage(self) -> list[Ancestor]:
        """This adapter and those that it was trained from, the newest first."""
        own = Ancestor(uri=self.uri, digest=self.digest, dataset_digest=self.manifest.dataset_digest)
        return [own, *(self.manifest.continued_from or [])][:MAX_ANCESTORS]


def fetch(wanted: ContinueFrom, stores: Stores, folder: Path) -> StartAdapter:
    """Download and check the adapter.

    Raises:
        AdapterNotFoundError: there is no artifact.
        InvalidSpecError: it is damaged, not the requested one, or not an adapter.
    """
    source = wanted.artifact
    if source is None:
        raise InvalidSpecError(
            f"{_FIELD}.fineTuneJob names a job of a cluster: for a local run use {_FIELD}.artifact with the uri of its "
            "artifact"
        )
    remote = stores.folder(
        source.uri,
        what="the adapter's folder",
        missing=AdapterNotFoundError,
        secret=source.secret_ref.name if source.secret_ref else None,
    )
    where = f"{_FIELD}.artifact.uri {source.uri}"
    if not remote.exists(ARTIFACT_MANIFEST):
        raise AdapterNotFoundError(
            f"{where} has no {ARTIFACT_MANIFEST}: name the folder of an artifact that a FineTuneJob published"
        )
    document = remote.read(ARTIFACT_MANIFEST, length=min(remote.size(ARTIFACT_MANIFEST), MAX_MANIFEST_BYTES + 1))
    digest = digest_of(document)
    if source.digest is not None and digest != source.digest:
        raise InvalidSpecError(f"{where} has the digest {digest} instead of {source.digest}: it is another artifact")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        manifest = parse_manifest(document)
        if manifest.adapter.method == "full":
            raise InvalidSpecError(f"{where} is a model, trained with method.full: use it as spec.baseModel")
        check_files(manifest.files)
        if PARITY_FILE not in manifest.files:
            raise InvalidSpecError(
                f"{where} has no {PARITY_FILE}, since it was imported where its base model did not fit into memory: "
                "import it with more memory"
            )
        for name, limit in (
            (ADAPTER_CONFIG, MAX_CONFIG_BYTES),
            (PARITY_FILE, _MAX_PARITY_BYTES),
            (ADAPTER_WEIGHTS, None),
        ):
            _download(remote, name, manifest, folder, limit)
        parse_object((folder / ADAPTER_CONFIG).read_bytes(), max_bytes=MAX_CONFIG_BYTES, max_values=_MAX_CONFIG_VALUES)
        Parity.model_validate_json((folder / PARITY_FILE).read_bytes())
        _check_types(folder / ADAPTER_WEIGHTS)
    except ValueError as error:
        raise InvalidSpecError(f"{where} is damaged: {error}; train it again, or name another artifact") from None
    _check_values(folder / ADAPTER_WEIGHTS, where)
    return StartAdapter(source.uri, digest, manifest, folder)


def _download(remote: Folder, name: str, manifest: ArtifactManifest, folder: Path, limit: int | None) -> None:
    entry, target = manifest.files.get(name), folder / name
    if entry is None:
        raise ValueError(f"{ARTIFACT_MANIFEST} does not list {name}")
    if limit is not None and entry.size_bytes > limit:
        raise ValueError(f"{name} has {entry.size_bytes} bytes, more than {limit}")
    if remote.size(name) == entry.size_bytes:
        remote.download(name, target)
        if file_sha256(target) == entry.sha256:
            return
    raise ValueError(f"{name} was changed after it was published: its SHA-256 is not the manifest's")


def _check_types(weights: Path) -> None:
    for name, tensor in read_tensors(weights).items():
        if tensor.dtype not in _TYPES:
            raise ValueError(f"{name} has the type {tensor.dtype}, which no adapter is trained in")


def _check_values(weights: Path, where: str) -> None:
    with safe_open(weights, framework="pt") as file:  # the checks have less memory than a large adapter takes
        for name in file.keys():  # noqa: SIM118 - it is not iterable
            parts = file.get_tensor(name).reshape(-1).split(_VALUES_AT_ONCE)
            if not all(bool(part.isfinite().all()) for part in parts):
                raise InvalidSpecError(f"{where} cannot be continued: {name} has values that are not finite")


def check_base(start: StartAdapter, fingerprint: str, uri: str) -> None:
    """Raise InvalidSpecError if the adapter belongs to another base model."""
    base = start.manifest.base
    if base.fingerprint != fingerprint:
        raise InvalidSpecError(
            f"{_FIELD}: the adapter was trained on another base model ({base.uri}, {base.fingerprint[:19]}…) than "
            f"spec.baseModel ({uri}, {fingerprint[:19]}…): use that base model"
        )


def with_method(job: FineTuneJob, start: StartAdapter) -> FineTuneJob:
    """Return the job with its method, taken from the adapter if the manifest has none.

    Raises:
        InvalidSpecError: the adapter cannot be continued, or its method does not fit another field of the spec.
    """
    kind = str(start.config.get("peft_type"))
    if kind in _NOT_CONTINUED or start.config.get("prefix_projection"):
        reason = _NOT_CONTINUED.get(kind, "the network that computes its vectors is not part of the artifact")
        raise InvalidSpecError(f"{_FIELD}: an adapter of type {kind} cannot be continued, because {reason}")
    if job.spec.requested_method is not None:
        return job
    try:
        found = adapter_of({**_whole_alphas(start.config), "base_model_name_or_path": "its/base", "revision": None})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InvalidSpecError(f"{_FIELD}: {ADAPTER_CONFIG} of the adapter is malformed: name another one") from None
    if found.omitted:
        raise InvalidSpecError(
            f"{_FIELD}: the adapter's {', '.join(sorted(found.omitted))} has no counterpart in a method's fields: set "
            "spec.method to the method that trained it"
        )
    document = job.manifest()
    document["spec"]["method"] = found.method
    try:
        return FineTuneJob.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        text = problem["msg"].removeprefix("Value error, ")
        raise InvalidSpecError(
            f"{_FIELD}: the adapter's method does not fit the spec: {'.'.join(map(str, problem['loc']))}: {text}"
        ) from None


def _whole_alphas(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration with the nearest whole alphas: a method's fields have no others."""
    alphas = {name: round(value) for name, value in (config.get("alpha_pattern") or {}).items()}
    return {**config, "alpha_pattern": alphas} | (
        {"lora_alpha": round(config["lora_alpha"])} if "lora_alpha" in config else {}
    )


def with_scales(planned: MethodPlan, start: StartAdapter) -> MethodPlan:
    """Return the plan with the exact alphas of the adapter that its method was taken from.

    They are no whole numbers if it was saved with twice its rank and scaled by alpha / √rank.
    """
    if not isinstance(planned.config, LoraConfig):
        return planned
    alphas = {"lora_alpha": start.config["lora_alpha"], "alpha_pattern": start.config.get("alpha_pattern") or {}}
    return replace(planned, config=replace(planned.config, **alphas))


def check_method(start: StartAdapter, planned: MethodPlan, method: Method, modules: Modules) -> None:
    """Check that the planned adapter is of the kind of the given one, with the same modules, ranks and scales.

    Raises:
        InvalidSpecError: it differs; the message states how.
    """
    assert planned.config is not None  # noqa: S101 - CEL refuses method.full
    ours = published_config(planned.config.to_dict(), sorted(planned.modules), doubled=planned.doubled)
    theirs = start.config
    named = {
        name.key: str(type(method.fields).model_fields[own].alias) for own, name in method.fields.peft_names.items()
    }
    keys = ["peft_type"] if ours["peft_type"] != theirs.get("peft_type") else {*ours, *theirs} - _WITHOUT_EFFECT
    differ = [
        f"{named.get(key, key)} is {_shown(ours.get(key))} in spec.method and {_shown(theirs.get(key))} in the adapter"
        for key in sorted(keys, key=_by_importance)
        if (ours.get(key) or None) != (theirs.get(key) or None)
    ]
    # The tensors of a prompt follow from the number of its tokens.
    if not differ and method.fields.traits.counted and not planned.config.is_prompt_learning:
        differ = _tensor_differences(start, planned, method, modules)
    if differ:
        raise InvalidSpecError(
            f"{_FIELD}: the adapter and spec.method differ: {'; '.join(differ[:3])}: remove spec.method to use the "
            "adapter's, or make them agree"
        )


def check_probes(start: StartAdapter, vocabulary: int) -> None:
    """Raise InvalidSpecError if the recorded answers cannot be computed: `check_answers` does it on the GPU."""
    parity = Parity.model_validate_json((start.folder / PARITY_FILE).read_bytes())
    sequences = [[*probe.prompt_token_ids, *probe.answer_token_ids] for probe in parity.probes]
    recorded = [position.chosen for probe in parity.probes for position in probe.adapter]
    fits = all(0 <= token < vocabulary for tokens in sequences for token in tokens)
    short = sum(map(len, sequences)) <= _MAX_PROBE_TOKENS
    answers = sum(len(probe.answer_token_ids) for probe in parity.probes)
    if not (fits and short and 0 < answers == len(recorded) and all(map(math.isfinite, recorded))):
        raise InvalidSpecError(
            f"{_FIELD}: {PARITY_FILE} of the adapter has no answers of this base model that can be checked: train the"
            " adapter again, or name another one"
        )


def _by_importance(key: str) -> tuple[bool, bool, str]:
    """Return the key for sorting: rank and alpha first."""
    return key != "r", key != "lora_alpha", key


def _tensor_differences(start: StartAdapter, planned: MethodPlan, method: Method, modules: Modules) -> list[str]:
    """Compare the tensors of the adapter with those of the planned one, by name and shape."""
    assert planned.config is not None  # noqa: S101 - CEL refuses method.full
    model = weightless.wrapped(planned.config, modules.config, method.name)
    ours = {name: tuple(tensor.shape) for name, tensor in _state(model).items()}
    theirs = {name: tensor.shape for name, tensor in read_tensors(start.folder / ADAPTER_WEIGHTS).items()}
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    differ = [f"modules: {missing[0]} is not in the adapter"] if missing else []
    differ += [f"modules: {extra[0]} is in the adapter only"] if extra else []
    return differ or [
        f"{name} has the shape {list(ours[name])} in spec.method and {list(theirs[name])} in the adapter"
        for name in sorted(ours)
        if ours[name] != theirs[name]
    ]


def _state(model: PeftModel) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def load(model: PeftModel, folder: Path) -> None:
    """Replace the weights of a new adapter by those of the adapter in a folder.

    Raises:
        SelfCheckError: the adapter differs from the file afterwards.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(model, dict(saved))
    now = _state(model)
    wrong = sorted(set(saved) ^ set(now)) or [
        name for name in sorted(saved) if not torch.equal(now[name].cpu(), saved[name].to(now[name].dtype))
    ]
    if wrong:
        raise SelfCheckError(f"the adapter of {_FIELD} was not loaded completely: {wrong[0]} differs")


def check_answers(model: PeftModel, folder: Path) -> None:
    """Check that the model gives the probabilities that were recorded when the adapter was published.

    On a base in 4 bits they differ by the quantisation error, for which there is no limit.

    Raises:
        SelfCheckError: it does not, so it is not that adapter on that base.
    """
    if any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
        return
    parity = Parity.model_validate_json((folder / PARITY_FILE).read_bytes())
    expected = [position.chosen for probe in parity.probes for position in probe.adapter]
    found = _chosen(model, parity)
    exact = parity.data_type == "float32" and all(tensor.dtype is torch.float32 for tensor in model.parameters())
    difference = abs(math.fsum(found) - math.fsum(expected)) / max(1, len(expected))
    if not difference <= (_ROUNDING if exact else _COARSE_ROUNDING) * max(1.0, -math.fsum(expected) / len(expected)):
        raise SelfCheckError(
            f"with the adapter of {_FIELD} the model gives answers a mean log-probability of "
            f"{math.fsum(found) / len(found):.4f}, and {PARITY_FILE} recorded {math.fsum(expected) / len(expected):.4f}"
        )


def _chosen(model: Any, parity: Parity) -> list[float]:  # noqa: ANN401 - a PeftModel, called as a module
    """Return the log-probabilities of the recorded answers' tokens."""
    was_training = model.training
    model.eval()
    found: list[float] = []
    try:
        with torch.no_grad(), mixed_precision(model):
            for probe in parity.probes:
                answer = probe.answer_token_ids
                logits = model(input_ids=batch_of_one(model, [*probe.prompt_token_ids, *answer])).logits
                scores = torch.log_softmax(logits[0, -len(answer) - 1 : -1].float(), dim=-1).cpu()
                found += scores.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    finally:
        model.train(was_training)
    return found


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"  # noqa: PLR2004
