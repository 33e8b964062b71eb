"""Forms of rows: their columns, and what a row of each form becomes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunesmith.api.finetunejob import FORMATS
from tunesmith.api.finetunejob_status import DropReason
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.data.messages import (
    Origin,
    RowError,
    check_chat,
    flag_of,
    is_message,
    messages_of,
    optional_text_of,
    rating_of,
    text_of,
    tools_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class RowForm(StrEnum):
    """Content of a row."""

    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    INSTRUCTION = "Instruction"
    TEXT = "Text"
    PREFERENCE = "Preference"
    UNPAIRED_PREFERENCE = "UnpairedPreference"


FORMS = {
    objective: frozenset(RowForm(data_format.value) for data_format in formats)
    for objective, formats in FORMATS.items()
}
"""Row forms that each objective can learn from."""
SFT_FORMS = FORMS[ObjectiveName.SFT]
"""Forms of which each is a text with a part that is learned."""
FUNCTIONS = "functions"
"""Column of the tools beside a `function_call` in rows of OpenAI's."""
_RATING = "label"
_ANSWER_MARK = "\n\nAssistant:"
"""Text that precedes each answer in dialogues written as one text (HH-RLHF)."""
REQUIRED = {
    RowForm.MESSAGES: ("messages",),
    RowForm.PROMPT_COMPLETION: ("prompt", "completion"),
    RowForm.INSTRUCTION: ("instruction", "output"),
    RowForm.TEXT: ("text",),
    RowForm.PREFERENCE: ("chosen", "rejected"),
    RowForm.UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
}
PROMPT_FORMS = frozenset(form for form, names in REQUIRED.items() if not {"chosen", "completion"}.isdisjoint(names))
"""Forms whose prompts and answers may be texts that are not a chat."""
SFT_FORMS_IN_ORDER = tuple(form for form in RowForm if form in SFT_FORMS)
OPTIONAL = {
    RowForm.MESSAGES: ("tools", "system", "history"),
    RowForm.PROMPT_COMPLETION: ("tools", "system", "history"),
    RowForm.INSTRUCTION: ("input", "tools", "system", "history"),
    RowForm.PREFERENCE: ("prompt", "tools", "system", "history"),
    RowForm.UNPAIRED_PREFERENCE: ("tools", "system", "history"),
}


def as_turns(part: Any, name: str) -> Any:  # noqa: ANN401 - a part of a row
    """Return a prompt or an answer as messages."""
    if name not in _TURNS or isinstance(part, list):
        return part
    return [{"role": "user" if name == "prompt" else "assistant", "content": part}]


_INSTRUCTIONS = frozenset({"system", "developer"})
_TURNS = frozenset({"prompt", "completion", "chosen", "rejected"})


def after(
    system: str | None, history: list[dict[str, Any]], messages: list[dict[str, Any]], what: str
) -> list[dict[str, Any]]:
    """Return the messages after a system prompt and earlier turns."""
    own, rest = (messages[:1], messages[1:]) if messages[0]["role"] in _INSTRUCTIONS else ([], messages)
    if system is not None and own and own[0]["content"] != system:
        raise RowError(f"has a {own[0]['role']} message, and another text in {what}: remove one of them")
    if system is not None and not own:
        own = [{"role": "system", "content": system}]
    return [*own, *history, *rest]


def _messages(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    messages = messages_of(value[names["messages"]], f"'{names['messages']}'", origin)
    check_chat(messages)
    return {"messages": messages, **_tools(value, names, origin)}


def _tools(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    given = value.get(names["tools"])
    functions = value.get(FUNCTIONS)
    if given is None and names["tools"] == "tools" and isinstance(functions, list):
        given = functions if all(isinstance(function, dict) for function in functions) else None
    tools = tools_of(given, origin)
    return {"tools": tools} if tools else {}


def _prompt_and_answers(value: dict[str, Any], names: dict[str, str], origin: Origin, *answers: str) -> dict[str, Any]:
    """Return prompt and answers: all as texts, or all as messages if one of them is."""
    result: dict[str, Any] = {}
    for name in ("prompt", *answers):
        given, what = value[names[name]], f"'{names[name]}'"
        if name == "completion":
            given = _first_answer(given)
        result[name] = messages_of(given, what, origin) if isinstance(given, list | dict) else text_of(given, what)
    if any(isinstance(part, list) for part in result.values()):
        result = {name: as_turns(part, name) for name, part in result.items()}
        length = len(result["prompt"])
        if all(result[name][:length] == result["prompt"] for name in answers):
            result |= {name: result[name][length:] for name in answers}  # whole chats, which repeat the prompt
        for name in answers:
            if not result[name] or result[name][-1]["role"] != "assistant":
                raise RowError(
                    f"the last message of '{names[name]}' must be the assistant's answer, which is what is learned",
                    DropReason.INCOMPLETE,
                )
    return result | _tools(value, names, origin)


def _first_answer(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return the first of the texts that answer a question equally well, given as SQuAD does; other values as given."""
    texts = value.get("text") if isinstance(value, dict) and "role" not in value and "from" not in value else None
    return (texts[0] if texts else "") if isinstance(texts, list) else value


def _prompt_completion(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    if rating_of(value.get(_RATING)) is False:
        raise RowError(
            f"has '{_RATING}': {value[_RATING]}, so its answer is rated as bad and would be learned as if it were good:"
            f" set objective.kto, which learns from ratings, or remove such rows; remove the column '{_RATING}' if it"
            " is no rating"
        )
    return _prompt_and_answers(value, names, origin, "completion")


def _instruction(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    """Return a chat with one question, with the input below the instruction."""
    question = text_of(value[names["instruction"]], f"'{names['instruction']}'")
    extra = optional_text_of(value.get(names["input"]), f"'{names['input']}'")
    if extra is not None:
        question = f"{question}\n\n{extra}"
    answer = text_of(_first_answer(value[names["output"]]), f"'{names['output']}'")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **_tools(value, names, origin)}


def _text(value: dict[str, Any], names: dict[str, str], _: Origin) -> dict[str, Any]:
    return {"text": text_of(value[names["text"]], f"'{names['text']}'")}


def _preference(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    chosen, rejected, prompt = (value.get(names[name]) for name in ("chosen", "rejected", "prompt"))
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        result = _implicit_prompt(chosen, rejected, names)
    elif isinstance(chosen, list | dict) and isinstance(rejected, list | dict) and _are_whole(chosen, prompt):
        result = _common_prompt(chosen, rejected, names, origin) | _tools(value, names, origin)
    elif names["prompt"] not in value:
        raise RowError(f"'{names['prompt']}' is missing")
    else:
        result = _prompt_and_answers(value, names, origin, "chosen", "rejected")
    if result["chosen"] == result["rejected"]:
        raise RowError(f"'{names['chosen']}' and '{names['rejected']}' are the same", DropReason.NO_TARGET)
    return result


def _are_whole(chosen: object, prompt: object) -> bool:
    """Return True if an answer given as messages is a whole chat, which begins with the question."""
    if prompt is None or isinstance(chosen, dict):
        return prompt is None or not is_message(chosen)
    if not isinstance(prompt, str) or not isinstance(chosen, list) or not chosen:
        return False
    first = chosen[0]
    return not isinstance(first, dict) or first.get("role", first.get("from")) not in ("assistant", "gpt")


def _common_prompt(chosen: object, rejected: object, names: dict[str, str], origin: Origin) -> dict[str, Any]:
    """Return the common beginning of two chats as their prompt, and what follows as the answers."""
    better = messages_of(chosen, f"'{names['chosen']}'", origin)
    worse = messages_of(rejected, f"'{names['rejected']}'", origin)
    check_chat(better)
    check_chat(worse)
    pairs = enumerate(zip(better, worse, strict=False))
    same = next((index for index, (left, right) in pairs if left != right), min(len(better), len(worse)))
    same = min(same, len(better) - 1, len(worse) - 1)
    if same == 0:
        raise RowError(
            f"'{names['chosen']}' and '{names['rejected']}' begin with different messages, so they have no"
            " common prompt",
            DropReason.INCOMPLETE,
        )
    return {"prompt": better[:same], "chosen": better[same:], "rejected": worse[same:]}


def _implicit_prompt(chosen: str, rejected: str, names: dict[str, str]) -> dict[str, Any]:
    """Return the common beginning of two texts as their prompt.

    It ends after the last mark of an answer that both texts contain, or at their last common space.
    """
    what = f"'{names['chosen']}'", f"'{names['rejected']}'"
    common = chosen[: _common_length(text_of(chosen, what[0]), text_of(rejected, what[1]))]
    mark = common.rfind(_ANSWER_MARK)
    end = mark + len(_ANSWER_MARK) if mark >= 0 else max(common.rfind(space) for space in " \n\t")
    if end <= 0 or not common[:end].strip():
        raise RowError(f"{what[0]} and {what[1]} have no common prompt: add 'prompt'", DropReason.INCOMPLETE)
    return {
        "prompt": common[:end],
        "chosen": text_of(chosen[end:], what[0]),
        "rejected": text_of(rejected[end:], what[1]),
    }


def _common_length(left: str, right: str) -> int:
    """Return the number of characters with which both texts begin."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _unpaired(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    label = flag_of(value[names["label"]], f"'{names['label']}'")
    return _prompt_and_answers(value, names, origin, "completion") | {"label": label}


CHECKS: dict[RowForm, Callable[[dict[str, Any], dict[str, str], Origin], dict[str, Any]]] = {
    RowForm.MESSAGES: _messages,
    RowForm.PROMPT_COMPLETION: _prompt_completion,
    RowForm.INSTRUCTION: _instruction,
    RowForm.TEXT: _text,
    RowForm.PREFERENCE: _preference,
    RowForm.UNPAIRED_PREFERENCE: _unpaired,
}
