"""Write the architectures that the pinned vLLM serves, with adapters and without, and those with latent attention.

Reads vLLM's sources without importing them: some of its models need packages that its CPU build does not install.

Example: python server-image/engine-cpu/lora_architectures.py --check
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

ENVIRONMENT = Path(__file__).parent / ".venv"
TARGET = Path(__file__).parents[2] / "operator/src/tunesmith/contracts/vllm_architectures.py"
_REGISTRY_FIELDS = 2
_LATENT = frozenset({"MLAModules", "MLAAttention", "MultiHeadLatentAttentionWrapper"})
"""Classes of vLLM that compute latent attention."""
_MODELS = ("model_executor/models", "models")
"""Folders of vLLM's models."""
_BACKEND = "model_executor/models/transformers"
"""Folder of the models that vLLM runs with code of transformers; they may have latent attention, in theory."""


def registered(vllm: Path) -> dict[str, tuple[str, str]]:
    """Return the module and class of each architecture in vLLM's registry."""
    found = {}
    for node in ast.parse((vllm / "model_executor/models/registry.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                names = [str(part.value) for part in value.elts[:_REGISTRY_FIELDS] if isinstance(part, ast.Constant)]
                if len(names) == _REGISTRY_FIELDS:
                    found[str(key.value)] = (names[0], names[1])
    return found


def module_file(vllm: Path, module: str) -> Path | None:
    """Return the source of a module that the registry or an import names."""
    parts = module.split(".")
    base = vllm.joinpath(*parts[1:]) if parts[0] == "vllm" else vllm.joinpath("model_executor/models", *parts)
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _definitions(file: Path) -> tuple[dict[str, ast.ClassDef], dict[str, tuple[int, str, str]]]:
    """Return the classes of a source file, and the module and name of what it imports, by name."""
    classes, imported = {}, {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                imported[name.asname or name.name] = (node.level, node.module or "", name.name)
    return classes, imported


def origin(vllm: Path, file: Path, name: str) -> tuple[Path | None, str] | None:
    """Return the source file and the original name of a class that a file of vLLM imports; None: of another package."""
    _, imported = _definitions(file)
    if name not in imported:
        return None
    level, module, original = imported[name]
    if level:
        folder = file.parents[level - 1].relative_to(vllm)
        module = ".".join(["vllm", *folder.parts, *([module] if module else [])])
    elif not module.startswith("vllm."):
        return None
    return module_file(vllm, module), original


def supports_lora(vllm: Path, file: Path | None, name: str) -> bool:
    """Return True if a class is, or inherits from, vLLM's interface `SupportsLoRA`."""
    if name == "SupportsLoRA":
        return True
    if file is None:
        return False
    classes, _ = _definitions(file)
    if name in classes:
        bases = [base for base in classes[name].bases if isinstance(base, ast.Name)]
        return any(supports_lora(vllm, file, base.id) for base in bases)
    found = origin(vllm, file, name)
    return found is not None and supports_lora(vllm, *found)


def has_latent_attention(vllm: Path, file: Path | None, name: str, seen: set[tuple[Path, str]]) -> bool:
    """Return True if a model's class, or one that it is made of, computes latent attention (`MLAAttention`).

    When it loads the base, vLLM multiplies the weights of such an attention's `kv_b_proj` into others, past an adapter.

    Args:
        vllm: folder of the package.
        file: source that defines or imports the class.
        name: name of the class.
        seen: classes that were looked at, which is extended.
    """
    if name in _LATENT:
        return True
    if file is None or (file, name) in seen or not any(file.is_relative_to(vllm / part) for part in _MODELS):
        return False
    if file.is_relative_to(vllm / _BACKEND):
        return False
    seen.add((file, name))
    classes, _ = _definitions(file)
    if name in classes:
        used = {node.id for node in ast.walk(classes[name]) if isinstance(node, ast.Name)}
        return any(has_latent_attention(vllm, file, other, seen) for other in sorted(used))
    found = origin(vllm, file, name)
    return found is not None and has_latent_attention(vllm, *found, seen)


def source() -> str:
    """Return the generated module."""
    (installed,) = distributions(name="vllm", path=[str(folder) for folder in ENVIRONMENT.glob("lib/*/site-packages")])
    return _module(installed)


def _module(installed: Distribution) -> str:
    vllm = Path(str(installed.locate_file("vllm")))
    found = {
        architecture: (module_file(vllm, module), name) for architecture, (module, name) in registered(vllm).items()
    }
    verdicts = {architecture: supports_lora(vllm, *where) for architecture, where in found.items()}
    latent = {architecture for architecture, where in found.items() if has_latent_attention(vllm, *where, set())}
    lines = [
        '"""Architectures that vLLM serves. Generated by `make generate` from the pinned release: do not edit."""',
        "",
        f'VLLM = "{".".join(installed.version.split("+")[0].split(".")[:2])}"',
        '"""Release of vLLM."""',
    ]
    served = {architecture for architecture, lora in verdicts.items() if lora}
    for constant, architectures, meaning in (
        ("WITH_ADAPTERS", served, "Architectures that vLLM serves, with LoRA adapters."),
        ("WITHOUT_ADAPTERS", set(verdicts) - served, "Architectures that vLLM serves, but not with LoRA adapters."),
        ("LATENT_ATTENTION", served & latent, "Those with adapters that compute latent attention, past `kv_b_proj`."),
    ):
        names = sorted(architectures)
        lines += [f"{constant} = frozenset(", "    {", *(f'        "{name}",' for name in names), "    }", ")"]
        lines += [f'"""{meaning}"""']
    return "\n".join([*lines, ""])


def main() -> int:
    """Write the module; with `--check`, return 1 if it differs."""
    wanted = source()
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        sys.stdout.write(f"{TARGET.name} differs from the pinned vLLM: run `make generate`\n")
        return 1
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
