"""Model card of an artifact: the information needed to judge and use the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.dataset import DEFAULT_VALIDATION_FRACTION, TrainingSource
from tunesmith.api.evaluation import LOSS
from tunesmith.api.methods.declaration import ALL_LINEAR
from tunesmith.api.output import Merge
from tunesmith.contracts.parity import DECISIVE_GAP, nats, tolerance
from tunesmith_trainer.artifact import merge
from tunesmith_trainer.artifact.curves import loss_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.dataset import Dataset, DatasetSource
    from tunesmith.api.finetunejob import BaseModelSource, FineTuneJob, FineTuneJobSpec
    from tunesmith.api.finetunejob_status import EvaluationStatus, GateStatus, Preflight
    from tunesmith.api.method import Method
    from tunesmith.api.model import ApiModel
    from tunesmith_trainer.preflight.prepare import Prepared
    from tunesmith_trainer.training.loop import Trained

_MERGED = {Merge.ORIGINAL: "into the base as published", Merge.DEQUANTIZED: "into the dequantised 4-bit base"}


def text(
    job: FineTuneJob,
    prepared: Prepared,
    trained: Trained,
    versions: Mapping[str, str],
    merge_error: float | None,
    parity_gap: float,
) -> str:
    """Return Markdown with the Hub's front matter; without times, and without local paths except the manifest's URIs.

    Args:
        job: the FineTuneJob.
        prepared: inputs of the job.
        trained: training result with the scores.
        versions: versions of libraries by name.
        merge_error: distance of the merged model from the trained one; None if nothing was merged.
        parity_gap: distance between adapter and base, in nats.
    """
    spec, evaluation = job.spec, trained.evaluation
    base = spec.base_model.uri
    library = "transformers" if prepared.planned.config is None else "peft"
    front = [f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{', '.join(tags(spec.method))}]"]
    if base.startswith("hf://"):
        front.insert(0, f"base_model: {base.removeprefix('hf://')}")
    resolved, counted = prepared.resolved, prepared.preflight
    scored = [
        f"| {score.suite}: {score.metric} | {score.base} | {score.adapter} |"
        for score in evaluation.scores or []
        if score.metric != LOSS
    ]
    gates = [
        f"- {gate.suite}/{gate.metric}: {gate.value}, {_limits(gate)}: {'passed' if gate.passed else 'FAILED'}"
        for gate in evaluation.gates or []
    ]
    failures = [f"- {failure.suite}: {failure.message}" for failure in evaluation.failures or []]
    held_out = loss_label("Held-out loss", spec.objective_name)
    change = f" ({evaluation.loss_change})"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {job.metadata.name}",
            "",
            f"{_kind(prepared)} `{base}`, trained with Tunesmith on {counted.rows} rows, {counted.tokens} tokens.",
            "The licence and the limitations of that base model apply to it too.",
            "",
            "## Results",
            "",
            "| | base | adapter |",
            "|---|---|---|",
            f"| {held_out} | {evaluation.base_loss:.4f} | {evaluation.loss:.4f}{change} |",
            *scored,
            "",
            f"Scored in one run; the loss on {counted.validation_rows} held-out rows{_overlap(counted)}.",
            "The truth, safety and fairness of its answers were not measured.",
            distinction(parity_gap),
            *(["", "Gates:", "", *gates] if gates else []),
            *(["", "Not scored:", "", *failures] if failures else []),
            "",
            "![loss over the steps](curves.png)",
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            f"| Objective | {_objective(spec)} |",
            f"| Method | {_described(spec.method.name, spec.method.fields)} |",
            *_start(prepared),
            f"| Modules | {', '.join(resolved.target_modules or []) or 'none'} |",
            f"| Steps, batch size | {_steps(prepared, evaluation)}, {resolved.batch_size} |",
            f"| Learning rate | {resolved.learning_rate:g}, {spec.hyperparameters.scheduler} |",
            f"| Precision | {_precision(prepared)} |",
            f"| Seed | {spec.hyperparameters.seed} |",
            f"| Data | {_sources(spec.dataset.train)}; {resolved.dataset_digest} |",
            f"| Held out | {_held_out(spec.dataset)} |",
            f"| Rows not used | {_not_used(counted)} |",
            f"| Base | {_base(spec.base_model)}; {resolved.base_model_fingerprint} |",
            *_merged(spec, merge_error),
            f"| Versions | {', '.join(f'{name} {number}' for name, number in versions.items())} |",
            "",
            "## Use",
            "",
            *_loading(base, prepared),
            "",
            *_serving(job, prepared),
            "",
        ]
    )


def distinction(gap: float) -> str:
    """Describe how well adapter and base model can be told apart on an engine, from their distance in nats."""
    text = f"Its answers differ from the base model's by up to {nats(gap)} nats per token"
    undecided = [name for name in ("float32", "bfloat16") if gap < DECISIVE_GAP * tolerance(name, name)]
    if not undecided:
        return f"{text}, enough to check that an engine applies it."
    return f"{text}: too little to check in {' or '.join(undecided)} that an engine applies it."


def _steps(prepared: Prepared, evaluation: EvaluationStatus) -> str:
    """Format the steps, such as `30, stopped early after 24, published 18`."""
    parts = [str(prepared.resolved.total_steps)]
    if evaluation.stopped_early_at is not None:
        parts.append(f"stopped early after {evaluation.stopped_early_at}")
    if evaluation.published_step not in (None, evaluation.stopped_early_at or prepared.resolved.total_steps):
        parts.append(f"published {evaluation.published_step}")
    return ", ".join(parts)


def _start(prepared: Prepared) -> list[str]:
    """Format the adapters that training started from, the newest first."""
    ancestors = [f"{_code(ancestor.uri)}, {ancestor.digest}" for ancestor in prepared.lineage]
    return [f"| Continued from | {'; before that '.join(ancestors)} |"] if ancestors else []


def _overlap(counted: Preflight) -> str:
    """Describe the overlap of scored and trained rows."""
    overlaps = counted.also_trained or []
    held_out = sum(overlap.rows for overlap in overlaps if overlap.suite is None)
    text = f", {held_out or 'none'} of which {'are also' if held_out else 'are'} in the training data"
    suites = [
        f"{overlap.rows} of the {overlap.scored_rows} rows of suite {overlap.suite}"
        for overlap in overlaps
        if overlap.suite is not None
    ]
    return text + (f"; {' and '.join(suites)} are also in the training data" if suites else "")


def _kind(prepared: Prepared) -> str:
    return "All weights of" if prepared.planned.config is None else "An adapter for"


def _loading(base: str, prepared: Prepared) -> list[str]:
    """Return the code that loads the artifact: one line if transformers finds the base by its name."""
    if prepared.planned.config is None:
        name = "transformers"
        code = [
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")',
        ]
    elif base.startswith(("hf://", "file://")):
        name = "peft"
        code = [
            "from peft import AutoPeftModelForCausalLM",
            'model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")',
        ]
    else:
        name = "peft"
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f'base = AutoModelForCausalLM.from_pretrained("path/of/the/base")  # a copy of {base}',
            'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
        ]
    return [f"Load it with {name}:", "", "```python", *code, "```"]


def tags(method: Method) -> list[str]:
    """Return the Hub's tags for the kind of adapter, by the names that its filters and people use."""
    name = method.peft.type.lower() if method.peft is not None else method.name
    return [name, *(["lora"] if method.qlora is not None else []), "tunesmith"]


def _objective(spec: FineTuneJobSpec) -> str:
    name = spec.objective_name
    return name.value if spec.objective is None else _described(name, getattr(spec.objective, name))


def _described(name: str, fields: ApiModel) -> str:
    """Format the manifest's values, defaults included, such as `lora: rank 16, alpha 32`."""
    settings = [
        f"{field} {_value(value)}" for field, value in fields.manifest().items() if value not in (False, [ALL_LINEAR])
    ]
    return f"{name}: {', '.join(settings)}" if settings else name


def _precision(prepared: Prepared) -> str:
    precision, quantization = prepared.resolved.precision, prepared.resolved.quantization
    return f"{precision}, the base in {quantization}" if quantization is not None else f"{precision}"


def _sources(sources: Sequence[DatasetSource]) -> str:
    """Format the URIs, with the weights that are not 1."""
    return ", ".join(
        _code(source.uri)
        + (f" (weight {source.weight:g})" if isinstance(source, TrainingSource) and source.weight != 1 else "")
        for source in sources
    )


def _held_out(dataset: Dataset) -> str:
    if dataset.validation is not None:
        return _sources(dataset.validation)
    return f"{dataset.validation_fraction or DEFAULT_VALIDATION_FRACTION:g} of the rows"


def _not_used(counted: Preflight) -> str:
    """Format the unused rows, such as `3 Overlong, 1 Duplicate`."""
    return ", ".join(f"{rows.rows} {rows.reason}" for rows in counted.dropped or []) or "none"


def _base(source: BaseModelSource) -> str:
    revision = source.revision or ("main" if source.uri.startswith("hf://") else None)
    return _code(source.uri) + (f", revision {revision}" if revision is not None else "")


def _merged(spec: FineTuneJobSpec, error: float | None) -> list[str]:
    if spec.output is None or error is None:
        return []
    return [f"| Merged | {_MERGED[spec.output.merge]}; the weights {merge.describe(error)} |"]


def _code(uri: str) -> str:
    """Format a URI as code in a table cell."""
    return "`" + uri.replace("|", "\\|") + "`"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_value(inner)}" for name, inner in value.items()) + ")"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _serving(job: FineTuneJob, prepared: Prepared) -> list[str]:
    verdict = prepared.planned.servable
    if not verdict.vllm:
        return [f"vLLM cannot serve it in this form: {verdict.reason}."]
    return [
        "Serve it with Tunesmith, on a ServingPool of the same base model:",
        "",
        "```yaml",
        "apiVersion: tunesmith.dev/v1alpha1",
        "kind: AdapterDeployment",
        f"metadata: {{name: {job.metadata.name}}}",
        f"spec: {{adapterFrom: {{fineTuneJob: {{name: {job.metadata.name}}}}}}}",
        "```",
    ]


def _limits(gate: GateStatus) -> str:
    """Format the limits of a gate, such as `min 0.8`."""
    return ", ".join(f"{name} {value:g}" for name, value in (("min", gate.min), ("max", gate.max)) if value is not None)
