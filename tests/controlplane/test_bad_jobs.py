"""The bad jobs that the API server refuses, and a local run with the same words; see badjobs.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.controlplane.badjobs import BAD_JOBS, Stage
from tests.controlplane.manifests import job
from tunesmith.api.manifest import ManifestError, parse_manifest

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer

AT_APPLY = [name for name, bad in BAD_JOBS.items() if bad.stage is Stage.APPLY]


def test_there_are_sixty_of_them_and_few_need_a_training_pod() -> None:
    assert len(BAD_JOBS) >= 60
    assert [bad.stage for bad in BAD_JOBS.values()].count(Stage.TRAINING) <= 2


@pytest.mark.controlplane
@pytest.mark.parametrize("name", AT_APPLY)
def test_a_bad_job_is_refused_at_apply(apiserver: ApiServer, name: str) -> None:
    bad = BAD_JOBS[name]
    done = apiserver.kubectl("apply", "-f", "-", manifest=job("default", bad.name, **bad.spec))
    assert done.returncode != 0, f"taken: {done.stdout}"
    assert bad.mend in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", AT_APPLY)
def test_a_local_run_says_the_same(name: str) -> None:
    bad = BAD_JOBS[name]
    with pytest.raises(ManifestError) as refused:
        parse_manifest(json.dumps(job("default", bad.name, **bad.spec)), allow_file=False)
    assert (bad.locally or bad.mend) in str(refused.value)
