"""Translation of a fine-tuning job of OpenAI's API into the fields of a FineTuneJob. Pure."""

from __future__ import annotations

from typing import Any

from tunesmith.api.methods.lora import LORA
from tunesmith.cli.translation import EMPTY, Document, Draft, Translation, UntranslatableError

_IGNORED = frozenset(
    {
        *("object", "id", "created_at", "finished_at", "estimated_finish", "status", "error", "organization_id"),
        *("result_files", "trained_tokens", "fine_tuned_model", "usage_metrics", "shared_with_openai", "eval_id"),
    }
)
"""Keys that describe a run that has finished, or OpenAI's account."""
_METHODS = {"supervised": None, "dpo": "dpo"}
_PREFERENCE_RATE = 0.1
_ROWS = (
    "the rows need the columns prompt, chosen and rejected: convert them with jq -c '{prompt: .input.messages,"
    " tools: .input.tools, chosen: .preferred_output, rejected: .non_preferred_output}'"
)
_HINTS = {
    "metadata": "metadata.annotations of the FineTuneJob can have it",
    "integrations": "output.reporting supports TensorBoard, MLflow and WandB",
}


def translate(job: Document, base: str, data: str, validation: str | None) -> Translation:
    """Return the FineTuneJob spec that is equivalent to a job of `/v1/fine_tuning/jobs`, or to the request for one.

    Args:
        job: the JSON object.
        base: uri of the base model, since OpenAI's cannot be trained elsewhere.
        data: uri of the rows of training_file.
        validation: uri of the rows of validation_file; None if some of the training rows are to be held out.

    Raises:
        UntranslatableError: the job has no equivalent; the message names the key and the alternatives.
    """
    draft = Draft("OpenAI", {key: value for key, value in job.items() if value not in EMPTY}, _HINTS)
    if draft.given.get("object", "fine_tuning.job") != "fine_tuning.job" or "training_file" not in draft.given:
        raise UntranslatableError("it is not a fine-tuning job: save the answer of GET /v1/fine_tuning/jobs/ID")
    model = draft.read("model")
    draft.put("baseModel.uri", base)
    draft.changed["model"] = f"{model} cannot be trained outside OpenAI, so baseModel is {base}"
    draft.changed["training_file"] = f"the rows of {draft.read('training_file')} are read from {data}"
    draft.put("dataset.train", [{"uri": data}])
    held_out = draft.read("validation_file")
    if validation is not None:
        draft.put("dataset.validation", [{"uri": validation}])
    elif held_out is not None:
        draft.omit("validation_file", "name its rows with --validation; a tenth of the training rows is held out")
    objective = _read_method(draft)
    if "seed" in draft.given:
        draft.put("hyperparameters.seed", draft.read("seed"))
    suffix = draft.read("suffix") or draft.read("user_provided_suffix")
    draft.translated.add("user_provided_suffix")
    _read_integrations(draft)
    ignored = []
    for key, value in draft.given.items():
        if key in draft.translated or value is False:
            continue
        if key in _IGNORED:
            ignored.append(key)
        else:
            draft.omit(key)
    spec: Document = {"baseModel": draft.spec.pop("baseModel"), "dataset": draft.spec.pop("dataset")}
    spec |= {"method": {"lora": {}}} | ({"objective": objective} if objective else {}) | draft.spec
    return Translation(spec, draft.omitted, sorted(ignored), draft.changed, str(suffix) if suffix else None)


def _read_method(draft: Draft) -> Document:
    """Translate method and hyperparameters, and return the objective; empty for supervised fine-tuning."""
    method = draft.read("method", {"type": "supervised"})
    kind = method.get("type") if isinstance(method, dict) else method
    if kind not in _METHODS:
        raise UntranslatableError(f"method.type is {kind}: {' and '.join(_METHODS)} can be imported")
    nested = method.get(kind) or {}
    given = dict(draft.read("hyperparameters") or {}) | dict(nested.get("hyperparameters") or {})
    given = {key: value for key, value in given.items() if value not in ("auto", None)}
    for key in sorted(set(nested) - {"hyperparameters"}):
        draft.omit(f"method.{kind}.{key}")
    for key, field in (("n_epochs", "epochs"), ("batch_size", "batchSize")):
        if key in given:
            draft.put(f"hyperparameters.{field}", given.pop(key))
    multiplier = given.pop("learning_rate_multiplier", None)
    if multiplier is not None:
        usual = LORA.learning_rate * (_PREFERENCE_RATE if kind == "dpo" else 1)
        rate = float(f"{usual * float(multiplier):.6g}")
        draft.put("hyperparameters.learningRate", rate)
        draft.changed["learning_rate_multiplier"] = (
            f"it is applied to Tunesmith's default of {usual:g}, since OpenAI's is unknown: learningRate is {rate:g}"
        )
    objective: Document = {}
    if kind == "dpo":
        objective = {"dpo": {"beta": given.pop("beta")} if "beta" in given else {}}
        draft.put("dataset.format", "Preference")
        draft.changed["training_file"] += f"; {_ROWS}"
    else:
        draft.put("dataset.format", "Messages")
    for key in given:
        draft.omit(f"hyperparameters.{key}")
    return objective


def _read_integrations(draft: Draft) -> None:
    """Translate Weights & Biases, the only integration that both have."""
    integrations: Any = draft.given.get("integrations", [])
    if integrations and all(entry.get("type") == "wandb" for entry in integrations if isinstance(entry, dict)):
        draft.read("integrations")
        draft.put("output.reporting", ["WandB"])
        draft.changed["integrations"] = "put WANDB_API_KEY, WANDB_PROJECT and WANDB_ENTITY into the Secret of reporting"
