"""Arguments and variables of `vllm serve` that a ServingPool's `engine.args` and `engine.env` must not hold.

Checked against all arguments of vLLM 0.32. Arguments that are not listed tune the engine; the platform may choose them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_POSITIVE = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)
_BY_REASON: Final = {
    "it is set by the pool, usually from a field of its spec": (
        "--dtype", "--enable-lora", "--kv-cache-memory-bytes", "--max-cpu-loras", "--max-lora-rank", "--max-loras",
        "--max-model-len", "--middleware", "--model", "--no-enable-lora", "--override-generation-config",
        "--scheduling-policy", "--served-model-name", "--structured-outputs-config", "--tensor-parallel-size",
        "--trust-request-chat-template",
    ),
    "it reads unchecked arguments": ("--config", "--help"),
    "the gateway and the agent reach the engine at one address, over plain HTTP, with their own tokens": (
        "--api-key", "--enable-ssl-refresh", "--grpc", "--grpc-port", "--headless", "--host", "--port", "--root-path",
        "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-certfile", "--ssl-ciphers", "--ssl-keyfile", "--tokens-only",
        "--uds",
    ),
    "requests, tokens and draining are counted in one API server and one pod": (
        "--api-server-count", "--data-parallel-address", "--data-parallel-backend", "--data-parallel-external-lb",
        "--data-parallel-hybrid-lb", "--data-parallel-multi-port-external-lb", "--data-parallel-rank",
        "--data-parallel-rpc-port", "--data-parallel-size", "--data-parallel-size-local", "--data-parallel-start-rank",
        "--data-parallel-supervisor-port", "--disable-log-stats", "--distributed-executor-backend",
        "--elastic-ep-max-dp-size", "--enable-elastic-ep", "--enable-scale-out", "--master-addr", "--master-port",
        "--nnodes", "--node-rank", "--pipeline-parallel-size",
    ),
    "the agent's checks of the engine use it": ("--max-logprobs",),
    "it opens an unprotected port or connection, or writes files": (
        "--ec-transfer-config", "--kv-events-config", "--kv-transfer-config", "--profiler-config", "--tool-server",
        "--weight-transfer-config",
    ),
    "it runs code from outside the engine": (
        "--io-processor-plugin", "--log-config-file", "--logging-config", "--logits-processors",
        "--model-class-overrides", "--reasoning-parser-plugin", "--scheduler-cls", "--tool-parser-plugin",
        "--trust-remote-code", "--worker-cls", "--worker-extension-cls",
    ),
    "the engine must serve the base model with the adapters' fingerprint": (
        "--chat-template", "--code-revision", "--config-format", "--download-dir", "--hf-config-path", "--hf-overrides",
        "--hf-token", "--ignore-patterns", "--load-format", "--model-loader-extra-config", "--revision",
        "--skip-tokenizer-init", "--tokenizer", "--tokenizer-revision",
    ),
    "only the agent loads adapters, after checking them": (
        "--default-mm-loras", "--lora-modules", "--lora-target-modules",
    ),
    "the agent checks engines by the text that they generate, and a pooling model generates none": (
        "--convert", "--pooler-config", "--runner",
    ),
    "it logs requests and responses": (
        "--enable-log-deltas", "--enable-log-outputs", "--enable-log-requests",
    ),
    "it gives clients access to files or data of others": (
        "--allowed-local-media-path", "--enable-mm-embeds", "--enable-prompt-embeds", "--enable-trace-replay",
        "--mm-hasher-algorithm", "--prefix-caching-hash-algo", "--trust-request-mm-kwargs",
    ),
}  # fmt: skip
RESERVED_ARGUMENTS: Final = {name: reason for reason, names in _BY_REASON.items() for name in names}
"""Reasons by reserved argument of `vllm serve`, in its long form."""
_ALLOWED_PREFIXES: Final = ("--reasoning-parser",)
"""Arguments that are allowed although they are prefixes of reserved ones."""
RESERVED_VARIABLES: Final = (
    "GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE", "HOME", "MASTER_ADDR", "NCCL_SOCKET_IFNAME", "PYTHON[A-Z]*",
    "TP_SOCKET_IFNAME", "TUNESMITH_[A-Z_]*", "USER", "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_API_KEY", "VLLM_DEBUG_LOG_API_SERVER_RESPONSE", "VLLM_HOST_IP",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_LOGGING_CONFIG_PATH", "VLLM_LOOPBACK_IP", "VLLM_LORA_RESOLVER_[A-Z_]*",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "VLLM_NO_USAGE_STATS", "VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE",
)  # fmt: skip
"""Regular expressions of variables that the pool sets, that load code, or that give access to the engine."""

_SHORT = re.compile(r"-[^-0-9.]")
_NAME = re.compile(r"--[^=.]*")
_POSITIONAL = "Write --name=value, or a value after its --name."


def reserved_argument(argument: str) -> str | None:
    """Return why a word is not allowed in `engine.args`, with the fix; None if it is allowed or an argument's value.

    vLLM also accepts unique prefixes, underscores, `--name=value` and `--name.key=value` as the argument.
    """
    if _SHORT.match(argument):
        return f"{argument.split('=', 1)[0]} is a short form. Write the argument's long name."
    word = _NAME.match(argument)
    if word is None:
        return None
    if re.search(r"\s", word[0]):
        return "the name of an argument must not contain spaces. Write the value after = or as the next element."
    name = word[0].replace("_", "-")
    if name in RESERVED_ARGUMENTS:
        return f"{name} is reserved: {RESERVED_ARGUMENTS[name]}. Remove it."
    if name in _ALLOWED_PREFIXES:
        return None
    for reserved, reason in RESERVED_ARGUMENTS.items():
        if reserved.startswith(name):
            return f"{name} abbreviates {reserved}, which is reserved: {reason}. Remove it."
    return None


def refused_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a sentence, with the index, for each element of `engine.args` that is refused.

    A word without dashes is the value of the preceding argument, or a positional argument: the model.
    """
    sentences = []
    takes_value = False
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            takes_value = "=" not in argument
        problem = reserved_argument(argument)
        if problem is None and not takes_value:
            problem = "" if argument.startswith("--") else "it is not the value of an argument. " + _POSITIONAL
        if problem:
            sentences.append(f"spec.engine.args[{index}]: {problem}")
    return sentences


def reserved_variable(name: str) -> bool:
    """Return True if a variable is not allowed in `engine.env`."""
    return re.fullmatch("|".join(RESERVED_VARIABLES), name) is not None


_RESERVED_CEL = "[" + ",".join(f"'{name}'" for name in RESERVED_ARGUMENTS) + "]"
_ARGUMENT_NAMES_CEL = (
    "self.args.filter(a, a.startsWith('--'))"
    ".map(a, (a + '=').substring(0, (a + '=').indexOf('=')))"
    ".map(a, (a + '.').substring(0, (a + '.').indexOf('.')).replace('_', '-'))"
)
_ALLOWED_CEL = f"[{', '.join(map(repr, _ALLOWED_PREFIXES))}]"
_RESERVED_ARGUMENT_CEL = f"!(a in {_ALLOWED_CEL}) && {_RESERVED_CEL}.exists(r, r.startsWith(a))"
ARGUMENTS_CEL: Final = f"!has(self.args) || !{_ARGUMENT_NAMES_CEL}.exists(a, {_RESERVED_ARGUMENT_CEL})"
ARGUMENTS_MESSAGE_CEL: Final = (
    f"'engine.args: ' + {_ARGUMENT_NAMES_CEL}.filter(a, {_RESERVED_ARGUMENT_CEL})[0] + "
    "' is reserved, or abbreviates a reserved argument. Remove it; docs/requests.md lists the reserved arguments with "
    "the reasons, and there are fields for most, such as engine.maxLoras'"
)
VALUES_CEL: Final = (
    "!has(self.args) || self.args.all(a, a != '') && self.args.join('\\n').matches("
    "'^(--[^=\\\\s]*(=[^\\n]*|(\\n([^-\\n]|-[0-9.])[^\\n]*)*)(\\n|$)|-[^-\\n][^\\n]*(\\n|$))*$')"
)
"""True if each element is an argument, or the value of the preceding one, written without `=`. `SHORT_CEL` covers short
forms, with their own message."""
SHORT_CEL: Final = "!has(self.args) || self.args.all(a, !a.matches('^-[^-0-9.]'))"
VARIABLES_CEL: Final = f"!has(self.env) || self.env.all(v, !v.name.matches('^({'|'.join(RESERVED_VARIABLES)})$'))"


def max_sequences(arguments: Sequence[str]) -> int | None:
    """Return the value of --max-num-seqs, or None if it is absent or not a positive number; the last one counts."""
    found = None
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name.replace("_", "-") == "--max-num-seqs":
            found = value if separator else "".join(arguments[index + 1 : index + 2])
    return int(found) if found is not None and _POSITIVE.fullmatch(found) else None
