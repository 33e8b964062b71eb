"""Minimal manifests, and FineTuneJobs that must be refused: by the API server and, with the same sentence, locally."""

from __future__ import annotations

import copy
from typing import Any

API = "tunesmith.dev/v1alpha1"
REMOVE = object()
LOCAL_ONLY = "file:// uris work only in a local run (tunesmith run)"
ONE_METHOD = (
    "method must have exactly one of lora, qlora, adaLora, ia3, prefixTuning, promptTuning, pTuning, full, peft: "
    "keep one and remove the others"
)


def job(namespace: str, name: str = "tone", **changes: object) -> dict[str, Any]:
    """A minimal FineTuneJob; changes are given as `hyperparameters__maxSteps=3`."""
    spec = {
        "baseModel": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": {"lora": {}},
    }
    return manifest("FineTuneJob", namespace, name, spec, changes)


def pool(namespace: str, name: str = "small", **changes: object) -> dict[str, Any]:
    spec = {"modelName": "base", "baseModel": {"uri": "s3://models/base"}}
    return manifest("ServingPool", namespace, name, spec, changes)


def adapter(namespace: str, name: str = "tone", **changes: object) -> dict[str, Any]:
    return manifest("AdapterDeployment", namespace, name, {"adapterFrom": {"fineTuneJob": {"name": "tone"}}}, changes)


def manifest(kind: str, namespace: str, name: str, spec: dict[str, Any], changes: dict[str, object]) -> dict[str, Any]:
    spec = copy.deepcopy(spec)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = spec
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is REMOVE:
            del node[last]
        else:
            node[last] = value
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}


URI = "a uri is hf://organisation/name, s3://bucket/path, gs://bucket/path, az://container/path or pvc://claim/path"
EPOCHS = "hyperparameters.epochs and hyperparameters.maxSteps are mutually exclusive: remove one of them"
DIVIDE = "hyperparameters.microBatchSize must divide hyperparameters.batchSize (8 if absent): change one of them"
CHECKPOINT = (
    "checkpoint.everySteps, checkpoint.everyRatio and checkpoint.everyMinutes are mutually exclusive: keep one of them"
)
INTERVAL = "evaluation.everySteps and evaluation.everyRatio are mutually exclusive: remove one of them"
HUB_DATA = "a data set on the Hugging Face Hub is hf://datasets/organisation/name, followed by a folder, a file"
TEXTS = (
    "dataset.format Text trains on every token of the unchanged text: remove dataset.lossOn and dataset.chatTemplate"
)
HELD_OUT = "dataset.validation and dataset.validationFraction are mutually exclusive: remove one of them"
QUANTITY = "a quantity is a number with an optional unit, such as 2, 500m, 8Gi or 1.5Gi"
MEMORY = "resources.memory is less than 64Mi: add its unit, as in 8Gi"
EXTENDED = "an extended resource is a domain and a name, such as nvidia.com/gpu"
LABEL = "a label's value has letters, digits, '-', '.' and '_', and begins and ends with a letter or digit"
NAME = "a name has lower-case letters, digits, '-' and '.', and begins and ends with a letter or digit"
DORA = "dora supports initialization Default, Gaussian, Orthogonal, EVA only: use one of them, or remove dora"
EVEN = "initialization Orthogonal needs an even rank: change the rank"
FULL_WEIGHTS = "qlora.initialization must be Default, Gaussian, EVA or LoftQ, because the others need unquantized"
FEWER_RANKS = "adaLora.targetRank must be less than adaLora.initialRank, because ranks are only reduced"
INNER = "ia3.feedforwardModules must be a subset of ia3.targetModules: add them to ia3.targetModules"
UNFIT = "dataset.format does not match the objective: dpo, orpo and kto train on Preference"
FULL = "method.full supports the objectives sft and orpo only"
UNSUPPORTED = 'Unsupported value: "int3": supported values: "nf4"'
FROM_ONE = "in body should be greater than or equal to 1"
UP_TO_512 = "in body should be less than or equal to 512"
SHARED = {"gpus": 2, "dataParallelism": "FSDP2"}
ALONE = "resources.dataParallelism needs several processes: remove it"
UNSHARED = "resources.dataParallelism: FSDP2 supports lora, qlora, ia3 and full"
WHOLE = "hyperparameters.optimizer: with FSDP2, method.full supports AdamW and SGD only"
IDLE = "hyperparameters.batchSize (8 if absent) must be at least resources.nodes"

JSONL = "s3://data/rows.jsonl"
LOSS_SUITE = {"name": "rows", "heldOutLoss": {}}
DEQUANTIZED = "output.merge: Dequantized needs a base model in 4 bits (method.qlora"
ONE_PLACE = "an entry of output.exports must have exactly one of uri and hub: remove the other"
SAME_PLACE = "two entries of output.exports have the same destination: remove one of them"
COPY = "a uri of a copy is s3://bucket/path, gs://bucket/path or az://container/path, without a trailing slash"
REPOSITORY = "a repository of the Hugging Face Hub is organisation/name, with letters, digits, '_', and single '-'"
ONE_SUITE = "a suite of evaluation.suites must have exactly one of heldOutLoss, generation and lmEval: keep one and"
NO_SUITE = "a gate of evaluation.gates refers to a suite that is not in evaluation.suites: correct its name"
NO_METRIC = "a gate of evaluation.gates refers to a metric that its suite does not have: heldOutLoss has Loss and"
NO_LIMIT = "a gate of evaluation.gates must have min or max: without them it would always pass"

FROM_JOB = {"fineTuneJob": {"name": "wren"}}
FROM_ARTIFACT = {"artifact": {"uri": "s3://adapters/wren"}}
ONE_START = "continueFrom must have exactly one of fineTuneJob and artifact: keep one and remove the other"
NO_FULL = "continueFrom starts from an adapter, and method.full trains none: remove continueFrom"
INITIALIZED = "continueFrom starts from the adapter's weights, so they are not initialized: remove"
ITSELF = "spec.continueFrom.fineTuneJob must name another FineTuneJob than this one"

# case → (what is changed in a minimal job, what `kubectl apply` says, what a local run says)
REFUSED_JOBS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no method": ({"method": {}}, ONE_METHOD, ONE_METHOD),
    "two adapters to start from": ({"continueFrom": {**FROM_JOB, **FROM_ARTIFACT}}, ONE_START, ONE_START),
    "no adapter to start from": ({"continueFrom": {}}, ONE_START, ONE_START),
    "full from an adapter": ({"continueFrom": FROM_JOB, "method": {"full": {}}}, NO_FULL, NO_FULL),
    "an initialized start": (
        {"continueFrom": FROM_JOB, "method": {"lora": {"initialization": "PiSSA"}}},
        INITIALIZED,
        INITIALIZED,
    ),
    "a start in 4 bits that is initialized": (
        {"continueFrom": FROM_ARTIFACT, "method": {"qlora": {"initialization": "LoftQ"}}},
        INITIALIZED,
        INITIALIZED,
    ),
    "a start from itself": ({"continueFrom": {"fineTuneJob": {"name": "tone"}}}, ITSELF, ITSELF),
    "a digest of nothing": (
        {"continueFrom": {"artifact": {"uri": "s3://a/tone", "digest": "sha256:abc"}}},
        "a digest is sha256: and 64 hex digits",
        "a digest is sha256: and 64 hex digits",
    ),
    "no time before deletion": (
        {"ttlSecondsAfterFinished": -1},
        "spec.ttlSecondsAfterFinished in body should be greater than or equal to 0",
        "spec.ttlSecondsAfterFinished is -1: it must be at least 0",
    ),
    "lora and ia3": ({"method": {"lora": {}, "ia3": {}}}, ONE_METHOD, ONE_METHOD),
    "dora on a changed base": ({"method": {"lora": {"dora": True, "initialization": "PiSSA"}}}, DORA, DORA),
    "odd rank": ({"method": {"lora": {"rank": 3, "initialization": "Orthogonal"}}}, EVEN, EVEN),
    "a beginning in 4 bits": ({"method": {"qlora": {"initialization": "OLoRA"}}}, FULL_WEIGHTS, FULL_WEIGHTS),
    "ranks that grow": ({"method": {"adaLora": {"initialRank": 4}}}, FEWER_RANKS, FEWER_RANKS),
    "an unnamed inner module": ({"method": {"ia3": {"feedforwardModules": ["down_proj"]}}}, INNER, INNER),
    "full and dpo": ({"method": {"full": {}}, "objective": {"dpo": {}}}, FULL, FULL),
    "pairs without an objective": ({"dataset__format": "Preference"}, UNFIT, UNFIT),
    "pairs for sft": ({"dataset__format": "Preference", "objective": {"sft": {}}}, UNFIT, UNFIT),
    "labels for dpo": ({"dataset__format": "UnpairedPreference", "objective": {"dpo": {}}}, UNFIT, UNFIT),
    "a Secret for a claim": (
        {"baseModel": {"uri": "pvc://claim/model", "secretRef": {"name": "mine"}}},
        "pvc:// and https:// uris are read without credentials: remove the secretRef",
        "pvc:// and https:// uris are read without credentials: remove the secretRef",
    ),
    "more GPUs than sequences": ({"resources": {"gpus": 16}}, IDLE, IDLE),
    "more nodes than sequences": ({"resources": {"gpus": 0, "nodes": 9}}, IDLE, IDLE),
    "more ranks than micro-batches": (
        {"resources": {"gpus": 2, "nodes": 2}, "hyperparameters": {"batchSize": 16, "microBatchSize": 8}},
        IDLE,
        IDLE,
    ),
    "one process that shares": (
        {"resources": {"gpus": 1, "dataParallelism": "DDP"}},
        ALONE,
        f"spec.resources: {ALONE}",
    ),
    "prompts over shared weights": ({"resources": SHARED, "method": {"promptTuning": {}}}, UNSHARED, UNSHARED),
    "rows looked at by shared weights": (
        {"resources": SHARED, "method": {"lora": {"initialization": "EVA"}}},
        UNSHARED,
        UNSHARED,
    ),
    "norms of shared weights in 4 bits": (
        {"resources": SHARED, "method": {"qlora": {"dora": True}}},
        UNSHARED,
        UNSHARED,
    ),
    "an optimizer of whole weights": (
        {"resources": SHARED, "method": {"full": {}}, "hyperparameters": {"optimizer": "Adafactor"}},
        WHOLE,
        WHOLE,
    ),
    "no node": (
        {"resources": {"nodes": 0}},
        f"spec.resources.nodes {FROM_ONE}",
        "spec.resources.nodes is 0: it must be at least 1",
    ),
    "a deadline of no time": (
        {"activeDeadlineSeconds": 0},
        f"spec.activeDeadlineSeconds {FROM_ONE}",
        "spec.activeDeadlineSeconds is 0: it must be at least 1",
    ),
    "a queue that is no name": ({"scheduling__queue": "-team"}, LABEL, LABEL),
    "two methods": ({"method__qlora": {}}, ONE_METHOD, ONE_METHOD),
    "method omitted": (
        {"method": REMOVE},
        "method is missing: set it, such as method: {lora: {}}",
        "method is missing: set it, such as method: {lora: {}}",
    ),
    "rank 0": (
        {"method__lora__rank": 0},
        f"spec.method.lora.rank: Invalid value: 0: spec.method.lora.rank {FROM_ONE}",
        "spec.method.lora.rank is 0: it must be at least 1",
    ),
    "rank -4": (
        {"method__lora__rank": -4},
        f"spec.method.lora.rank {FROM_ONE}",
        "spec.method.lora.rank is -4: it must be at least 1",
    ),
    "rank too high": (
        {"method__lora__rank": 513},
        f"spec.method.lora.rank {UP_TO_512}",
        "spec.method.lora.rank is 513: it must be at most 512",
    ),
    "rank as text": (
        {"method__lora__rank": "16"},
        "spec.method.lora.rank: ",
        'spec.method.lora.rank is "16": it must be a whole number',
    ),
    "rank of the other method": (
        {"method": {"qlora": {"rank": 0}}},
        f"spec.method.qlora.rank {FROM_ONE}",
        "spec.method.qlora.rank is 0: it must be at least 1",
    ),
    "unknown quantization": (
        {"method": {"qlora": {"quantization": {"type": "int3"}}}},
        f"spec.method.qlora.quantization.type: {UNSUPPORTED}",
        'spec.method.qlora.quantization.type is "int3": it must be nf4',
    ),
    "no data": (
        {"dataset__train": []},
        "spec.dataset.train in body should have at least 1 items",
        "spec.dataset.train is empty: Sources of the training rows, concatenated in this order.",
    ),
    "validation twice": (
        {"dataset__validation": [{"uri": "s3://data/held.jsonl"}], "dataset__validationFraction": 0.1},
        f'spec.dataset: Invalid value: "object": {HELD_OUT}',
        f"spec.dataset: {HELD_OUT}",
    ),
    "a model where a data set is asked for": (
        {"dataset__train": [{"uri": "hf://org/name"}]},
        f'spec.dataset.train[0]: Invalid value: "object": {HUB_DATA}',
        f"spec.dataset.train[0]: {HUB_DATA}",
    ),
    "texts that are learned in part": ({"dataset__format": "Text", "dataset__lossOn": "Completion"}, TEXTS, TEXTS),
    "texts in a chat template": ({"dataset__format": "Text", "dataset__chatTemplate": "{{ 1 }}"}, TEXTS, TEXTS),
    "a format that is none": (
        {"dataset__format": "ShareGPT"},
        'spec.dataset.format: Unsupported value: "ShareGPT": supported values: "Auto", "Messages", "PromptCompletion"',
        'spec.dataset.format is "ShareGPT": it must be',
    ),
    "a weight of nothing": (
        {"dataset__train": [{"uri": JSONL, "weight": 0}]},
        'spec.dataset.train[0].weight: Invalid value: "number": 0 is too small: it must be at least 0.001',
        "spec.dataset.train[0].weight is 0: it must be at least 0.001",
    ),
    "a learning rate of nothing": (
        {"hyperparameters": {"learningRate": 0}},
        'spec.hyperparameters.learningRate: Invalid value: "number": 0 is too small: it must be at least 1e-08',
        "spec.hyperparameters.learningRate is 0: it must be at least 1e-08",
    ),
    "a method's weight of nothing": (
        {"method": {"adaLora": {"orthogonality": 0}}},
        'spec.method.adaLora.orthogonality: Invalid value: "number": 0 is too small: it must be at least 0.001',
        "spec.method.adaLora.orthogonality is 0: it must be at least 0.001",
    ),
    "a suite of two kinds": (
        {"evaluation": {"suites": [{"name": "a", "heldOutLoss": {}, "generation": {"dataset": {"uri": JSONL}}}]}},
        ONE_SUITE,
        ONE_SUITE,
    ),
    "a task that is a path": (
        {"evaluation": {"suites": [{"name": "a", "lmEval": {"tasks": ["./tasks/mine.yaml"]}}]}},
        "a task of lmEval is a task name of lm-evaluation-harness",
        "a task of lmEval is a task name of lm-evaluation-harness",
    ),
    "a gate on a task that is not scored": (
        {
            "evaluation": {
                "suites": [{"name": "rows", "lmEval": {"tasks": ["arc_easy"]}}],
                "gates": [{"suite": "rows", "metric": "arc_challenge/acc", "min": 0.5}],
            }
        },
        NO_METRIC,
        NO_METRIC,
    ),
    "two suites of one name": (
        {"evaluation": {"suites": [LOSS_SUITE, LOSS_SUITE]}},
        "two suites of evaluation.suites have the same name: rename one of them",
        "two suites of evaluation.suites have the same name: rename one of them",
    ),
    "a gate on no suite": (
        {"evaluation": {"suites": [LOSS_SUITE], "gates": [{"suite": "rwos", "metric": "Loss", "max": 1}]}},
        NO_SUITE,
        NO_SUITE,
    ),
    "a gate on no metric": (
        {"evaluation": {"suites": [LOSS_SUITE], "gates": [{"suite": "rows", "metric": "loss", "max": 1}]}},
        NO_METRIC,
        NO_METRIC,
    ),
    "a gate without a limit": (
        {"evaluation": {"suites": [LOSS_SUITE], "gates": [{"suite": "rows", "metric": "Loss"}]}},
        NO_LIMIT,
        NO_LIMIT,
    ),
    "a merge into no 4-bit base": ({"output": {"merge": "Dequantized"}}, DEQUANTIZED, DEQUANTIZED),
    "an export to nowhere": ({"output": {"exports": [{}]}}, ONE_PLACE, ONE_PLACE),
    "an export to two places": (
        {"output": {"exports": [{"uri": "s3://copies/a", "hub": "org/a"}]}},
        ONE_PLACE,
        ONE_PLACE,
    ),
    "two exports to one folder": (
        {"output": {"exports": [{"uri": "s3://a/b"}, {"hub": "o/n"}, {"uri": "s3://a/b", "secretRef": {"name": "c"}}]}},
        SAME_PLACE,
        SAME_PLACE,
    ),
    "two exports to one repository": (
        {"output": {"exports": [{"hub": "o/n"}, {"hub": "o/n"}]}},
        SAME_PLACE,
        SAME_PLACE,
    ),
    "an export to a claim": ({"output": {"exports": [{"uri": "pvc://claim/a"}]}}, COPY, COPY),
    "an export to the Hub by its uri": ({"output": {"exports": [{"uri": "hf://org/name"}]}}, COPY, COPY),
    "an export to a bucket alone": ({"output": {"exports": [{"uri": "s3://bucket/"}]}}, COPY, COPY),
    "an export to a file": (
        {"output": {"exports": [{"uri": "file:///copies/a"}]}},
        LOCAL_ONLY,
        f"spec.output.exports[0].uri: {LOCAL_ONLY}",
    ),
    "an export that leaves its folder": (
        {"output": {"exports": [{"uri": "s3://bucket/../b"}]}},
        "a uri must not contain '..': write the resolved path",
        "a uri must not contain '..': write the resolved path",
    ),
    "a repository without its organisation": ({"output": {"exports": [{"hub": "name"}]}}, REPOSITORY, REPOSITORY),
    "a repository's name with two dots": ({"output": {"exports": [{"hub": "org/a..b"}]}}, REPOSITORY, REPOSITORY),
    "no exports": (
        {"output": {"exports": []}},
        "spec.output.exports in body should have at least 1 items",
        "spec.output.exports is empty: Destinations of copies",
    ),
    "nine exports": (
        {"output": {"exports": [{"hub": f"org/n{number}"} for number in range(9)]}},
        "spec.output.exports: Too many: 9: must have at most 8 items",
        "spec.output.exports is too long: at most 8 are allowed",
    ),
    "checkpoints by steps and by time": (
        {"checkpoint": {"everySteps": 5, "everyMinutes": 1}},
        CHECKPOINT,
        CHECKPOINT,
    ),
    "checkpoints by share and by time": (
        {"checkpoint": {"everyRatio": 0.5, "everyMinutes": 1}},
        CHECKPOINT,
        CHECKPOINT,
    ),
    "measurements by steps and by share": ({"evaluation": {"everySteps": 5, "everyRatio": 0.1}}, INTERVAL, INTERVAL),
    "epochs and steps": ({"hyperparameters": {"epochs": 1, "maxSteps": 10}}, EPOCHS, EPOCHS),
    "indivisible batch": ({"hyperparameters": {"batchSize": 8, "microBatchSize": 3}}, DIVIDE, DIVIDE),
    "micro batch that does not divide the default batch": ({"hyperparameters": {"microBatchSize": 16}}, DIVIDE, DIVIDE),
    "micro batch 0": (
        {"hyperparameters": {"microBatchSize": 0}},
        f"spec.hyperparameters.microBatchSize {FROM_ONE}",
        "spec.hyperparameters.microBatchSize is 0: it must be at least 1",
    ),
    "file base model": (
        {"baseModel__uri": "file:///models/base"},
        f'spec.baseModel: Invalid value: "object": {LOCAL_ONLY}',
        f"spec.baseModel.uri: {LOCAL_ONLY}",
    ),
    "file data set": (
        {"dataset__train": [{"uri": "file:///d.jsonl"}]},
        f'spec.dataset.train[0]: Invalid value: "object": {LOCAL_ONLY}',
        f"spec.dataset.train[0].uri: {LOCAL_ONLY}",
    ),
    "file validation set": (
        {"dataset__validation": [{"uri": "file:///d.jsonl"}]},
        LOCAL_ONLY,
        f"spec.dataset.validation[0].uri: {LOCAL_ONLY}",
    ),
    "a path instead of a uri": (
        {"baseModel__uri": "/models/base"},
        f'spec.baseModel.uri: Invalid value: "string": {URI}',
        f"spec.baseModel.uri: {URI}",
    ),
    "a bucket alone": ({"baseModel__uri": "s3://bucket"}, URI, URI),
    "a uri that leaves its folder": (
        {"baseModel__uri": "pvc://claim/../other"},
        "a uri must not contain '..': write the resolved path",
        "spec.baseModel: a uri must not contain '..': write the resolved path",
    ),
    "an https uri": ({"baseModel__uri": "https://x/y"}, URI, URI),
    "a Secret's name with capitals": ({"baseModel__secretRef": {"name": "Store"}}, NAME, NAME),
    "memory without a number": ({"resources": {"memory": "lots"}}, QUANTITY, f"spec.resources.memory: {QUANTITY}"),
    "memory without a unit": ({"resources": {"memory": 8}}, MEMORY, f"spec.resources: {MEMORY}"),
    "memory with the unit of CPUs": ({"resources": {"memory": "500m"}}, MEMORY, MEMORY),
    "a GPU's name without a domain": ({"resources": {"gpuResource": "gpu"}}, EXTENDED, EXTENDED),
    "a revision of a bucket": (
        {"baseModel__revision": "main"},
        "baseModel.revision is only for hf:// uris: remove it, or set the uri to a copy of that revision",
        "baseModel.revision is only for hf:// uris: remove it, or set the uri to a copy of that revision",
    ),
    "all-linear and a name": (
        {"method__lora__targetModules": ["all-linear", "q_proj"]},
        "targetModules: all-linear includes all linear modules: remove it or the other names",
        "targetModules: all-linear includes all linear modules: remove it or the other names",
    ),
    "a claim's name with capitals": ({"baseModel__uri": "pvc://Claim/base"}, URI, URI),
    "a toleration without a key": (
        {"scheduling": {"tolerations": [{"value": "a"}]}},
        "a toleration without a key must have the operator Exists: set the operator, or the key",
        "a toleration without a key must have the operator Exists: set the operator, or the key",
    ),
    "a toleration of anything with a value": (
        {"scheduling": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
        "a toleration with the operator Exists must not have a value: remove the value, or use Equal",
        "a toleration with the operator Exists must not have a value: remove the value, or use Equal",
    ),
    "a label's value with a space": ({"scheduling": {"nodeSelector": {"zone": "a b"}}}, LABEL, LABEL),
    "negative CPU": ({"resources": {"cpu": -1}}, QUANTITY, f"spec.resources.cpu: {QUANTITY}"),
    "no attempts": (
        {"maxAttempts": 0},
        f"spec.maxAttempts {FROM_ONE}",
        "spec.maxAttempts is 0: it must be at least 1",
    ),
    "a misspelt field": (
        {"hyperparameters": {"learningrate": 0.1}},
        "spec.hyperparameters.learningrate",
        "spec.hyperparameters.learningrate is not a known field; did you mean learningRate?",
    ),
}
