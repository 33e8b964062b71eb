"""The model card of an artifact: what a colleague needs to judge and use the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.evaluation import LOSS
from tunesmith.api.method import ALL_LINEAR

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import GateStatus, Preflight
    from tunesmith.api.method import Method
    from tunesmith_trainer.prepare import Prepared
    from tunesmith_trainer.training.loop import Trained


def text(job: FineTuneJob, prepared: Prepared, trained: Trained) -> str:
    """Markdown with the Hub's front matter; no times and no paths of this machine."""
    spec, evaluation = job.spec, trained.evaluation
    base = spec.base_model.uri
    library = "transformers" if prepared.planned.config is None else "peft"
    front = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [lora, tunesmith]"]
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
    failures = [f"- {one.suite}: {one.message}" for one in evaluation.failures or []]
    change = f" ({-(evaluation.loss_reduction_percent or 0):+.1f} %)"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {job.metadata.name}",
            "",
            f"{_kind(prepared)} `{base}`, trained with Tunesmith on {counted.rows} rows, {counted.tokens} tokens.",
            "The licence and the limits of that base model hold for it too.",
            "",
            "## Results",
            "",
            "| | base | adapter |",
            "|---|---|---|",
            f"| Held-out loss, nats per target token | {evaluation.base_loss:.4f} | {evaluation.loss:.4f}{change} |",
            *scored,
            "",
            f"Scored in one run; the loss on {counted.validation_rows} held-out rows{_trained_too(counted)}.",
            "Whether answers are true, safe or fair was not measured.",
            *(["", "Gates:", "", *gates] if gates else []),
            *(["", "Not scored:", "", *failures] if failures else []),
            "",
            "![loss over the steps](curves.png)",
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            f"| Method | {_method(spec.method)} |",
            f"| Modules | {', '.join(resolved.target_modules or []) or 'none'} |",
            f"| Steps, batch size | {resolved.total_steps}, {resolved.batch_size} |",
            f"| Learning rate | {resolved.learning_rate:g}, {spec.hyperparameters.scheduler} |",
            f"| Seed | {spec.hyperparameters.seed} |",
            f"| Rows dropped as too long | {counted.dropped_rows} |",
            f"| Data | {resolved.dataset_digest} |",
            f"| Base | {resolved.base_model_fingerprint} |",
            "",
            "## Use",
            "",
            *_loading(prepared),
            "",
            *_serving(job, prepared),
            "",
        ]
    )


def _trained_too(counted: Preflight) -> str:
    """How far what is scored was also learned."""
    found = counted.also_trained or []
    held_out = sum(one.rows for one in found if one.suite is None)
    text = f", {held_out} of which were trained on too" if held_out else " that were not trained on"
    suites = [
        f"{one.rows} of the {one.scored_rows} rows of suite {one.suite}" for one in found if one.suite is not None
    ]
    return text + (f"; {' and '.join(suites)} were trained on too" if suites else "")


def _kind(prepared: Prepared) -> str:
    return "All weights of" if prepared.planned.config is None else "An adapter for"


def _loading(prepared: Prepared) -> list[str]:
    if prepared.planned.config is None:
        name, load = "transformers", "AutoModelForCausalLM"
        about = []
    else:
        name, load = "peft", "AutoPeftModelForCausalLM"
        about = ["# base_model_name_or_path of adapter_config.json must be reachable"]
    return [
        f"Load it with {name}:",
        "",
        "```python",
        f"from {name} import {load}",
        *about,
        f'model = {load}.from_pretrained("path/of/this/folder")',
        "```",
    ]


def _method(method: Method) -> str:
    """Such as `lora: rank 16, alpha 32`: what the manifest says, defaults included."""
    fields = method.fields.manifest()
    said = [f"{name} {_value(value)}" for name, value in fields.items() if value not in (False, [ALL_LINEAR])]
    return f"{method.name}: {', '.join(said)}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_value(inner)}" for name, inner in value.items()) + ")"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _serving(job: FineTuneJob, prepared: Prepared) -> list[str]:
    verdict = prepared.planned.servable
    if not verdict.vllm:
        return [f"vLLM cannot serve it as it is: {verdict.reason}."]
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
    """Such as `min 0.8`."""
    return ", ".join(f"{name} {value:g}" for name, value in (("min", gate.min), ("max", gate.max)) if value is not None)
