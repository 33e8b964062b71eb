"""Runs in vLLM's environment: renders the prompts of chats as vLLM's server does.

Reads `{"model": folder, "templates": {name: text}, "requests": {name: [body]}}` and writes
`{template: {"parts": bool, "developer": bool, "prompts": {name: [text, or null if it is rejected]}}}` beside it.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import _detect_content_format, _detect_developer_role_support, safe_apply_chat_template
from vllm.tokenizers import get_tokenizer


def rendered(config: ModelConfig, tokenizer: Any, template: str, body: dict[str, Any]) -> str | None:
    """Return the prompt of a request; None if the template rejects it."""
    request = ChatCompletionRequest.model_validate(body)
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    messages, _, _ = parse_chat_messages(
        request.messages, config, content_format=_detect_content_format(template, default="string")
    )
    try:
        return safe_apply_chat_template(
            config, tokenizer, messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except VLLMValidationError:
        return None


def main(listed: Path) -> None:
    """Render all prompts listed in the file; see the module's docstring."""
    request = json.loads(listed.read_text())
    config = ModelConfig(model=request["model"], dtype="float32", enforce_eager=True)
    tokenizer = get_tokenizer(request["model"])
    answers: dict[str, dict[str, Any]] = {}
    for name, template in request["templates"].items():
        # The date that the trainer gives to templates.
        compiled = _compile_jinja_template(template)
        compiled.environment.globals["strftime_now"] = datetime(2024, 7, 26, tzinfo=UTC).strftime
        answers[name] = {
            "parts": _detect_content_format(template, default="string") == "openai",
            "developer": _detect_developer_role_support(template),
            "prompts": {
                chat: [rendered(config, tokenizer, template, body) for body in bodies]
                for chat, bodies in request["requests"].items()
            },
        }
    listed.with_suffix(".answers").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
