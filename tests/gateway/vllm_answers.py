"""Answers of vLLM 0.32 to the requests of tests/clients/calls.py, in the formats that it was seen to send."""

from __future__ import annotations

import json
from typing import Any

WORDS = ("The", " capital", " is", " Paris.")
ARGUMENTS = '{"city": "Paris"}'
USAGE = {"prompt_tokens": 31, "total_tokens": 35, "completion_tokens": 4}
RESPONSE_USAGE = {
    "input_tokens": 31,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 35,
}


def answer(path: str, body: dict[str, Any]) -> tuple[int, bytes | list[bytes]]:
    """The status and the body, or the events of a stream."""
    forced = isinstance(body.get("tool_choice"), dict)
    if path == "/v1/embeddings":
        return 404, b'{"error": {"message": "none", "code": "api_not_served"}}'
    if path == "/v1/messages/count_tokens":
        return 200, b'{"input_tokens": 31}'
    make = {"/v1/chat/completions": chat, "/v1/responses": responses, "/v1/messages": messages}[path]
    return make(body, forced=forced)


def events(*documents: dict[str, Any]) -> list[bytes]:
    return [f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode() for document in documents]


def chat(body: dict[str, Any], *, forced: bool) -> tuple[int, bytes | list[bytes]]:
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
    if body.get("stream"):
        head |= {"object": "chat.completion.chunk"}
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": word} for word in WORDS)]
        chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({**head, "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({**head, "choices": [], "usage": USAGE})
        return 200, [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(WORDS), "tool_calls": []}
    if forced:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        message |= {"content": "", "tool_calls": [call]}
    if body.get("response_format"):
        message["content"] = ARGUMENTS
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    if body.get("logprobs"):
        token = {"token": "The", "logprob": -0.1, "bytes": [84, 104, 101]}
        choice["logprobs"] = {"content": [{**token, "top_logprobs": [token, {**token, "token": "A"}]}]}
    return 200, json.dumps({**head, "choices": [choice], "usage": USAGE}).encode()


def responses(body: dict[str, Any], *, forced: bool) -> tuple[int, bytes | list[bytes]]:
    if body.get("store") or body.get("previous_response_id"):
        message = "store must be false: any pod of the pool may answer the next request, so responses are not stored."
        return 400, json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
    text = {"type": "output_text", "text": "".join(WORDS), "annotations": [], "logprobs": None}
    item: dict[str, Any] = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    item |= {"content": [text], "phase": None}
    if forced:
        item = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "weather", "arguments": ARGUMENTS}
    response = {
        "model": body["model"],
        "id": "resp_1",
        "created_at": 1,
        "incomplete_details": None,
        "instructions": None,
        "metadata": None,
        "object": "response",
        "output": [item],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": body.get("tools", []),
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": 24,
        "service_tier": "auto",
        "status": "completed",
        "truncation": "disabled",
        "usage": RESPONSE_USAGE,
    }
    if not body.get("stream"):
        return 200, json.dumps(response).encode()
    begun = {**response, "output": [], "status": "in_progress", "usage": None}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    documents: list[dict[str, Any]] = [
        {"response": begun, "type": "response.created"},
        {"response": begun, "type": "response.in_progress"},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.content_part.added", **place, "part": {**text, "text": "", "logprobs": []}},
        *({"type": "response.output_text.delta", **place, "delta": word, "logprobs": []} for word in WORDS),
        {"type": "response.output_text.done", **place, "text": text["text"], "logprobs": []},
        {"type": "response.content_part.done", **place, "part": text},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"response": response, "type": "response.completed"},
    ]
    return 200, events(*({**document, "sequence_number": n} for n, document in enumerate(documents)))


def messages(body: dict[str, Any], *, forced: bool) -> tuple[int, bytes | list[bytes]]:
    head = {"model": body["model"], "id": "chatcmpl-1", "type": "message", "role": "assistant"}
    if body.get("stream"):
        usage = {"input_tokens": 31, "output_tokens": 0}
        block = {"type": "text", "text": ""}
        return 200, events(
            {"message": {**head, "content": [], "stop_reason": None, "usage": usage}, "type": "message_start"},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
                for word in WORDS
            ),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {**usage, "output_tokens": 4}},
            {"type": "message_stop"},
        )
    content: dict[str, Any] = {"type": "text", "text": "".join(WORDS)}
    if forced:
        content = {"type": "tool_use", "id": "call_1", "name": "weather", "input": json.loads(ARGUMENTS)}
    usage = {"input_tokens": 31, "output_tokens": 4}
    return 200, json.dumps({**head, "content": [content], "stop_reason": "end_turn", "usage": usage}).encode()
