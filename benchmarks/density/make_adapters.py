"""Make a tiny base model, adapters for it, and the tokens with which each of them answers, as PEFT computes them.

Runs in the trainer's environment. Existing adapters are kept, so a second call with a higher count adds the rest.

The adapters are random and change every linear module of every layer, so each loads as many tensors as a trained one.
An adapter's marker is its greedy continuation of `PROMPT`. A seed is skipped if its marker is that of another adapter,
or if any of its tokens wins by less than `MARGIN`: another kernel or batch could compute the next token.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from prompt import PROMPT, TOKENS
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.contracts.parity import PARITY_FILE
from tunesmith_trainer.artifact.parity import record

VOCABULARY = 2048
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 256, 4, 4, 512
RANK = 8
MARGIN = 0.05
"""Smallest difference between the logits of the best and the second token."""
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCALE = 0.12
"""Standard deviation of the adapters' weights."""


def make_base(folder: Path) -> None:
    """Write the base model and its tokenizer, one word per token."""
    if (folder / "config.json").exists():
        return
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(temporary)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = decoders.ByteFallback()  # without one, an engine cannot constrain answers to JSON
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    ).save_pretrained(temporary)
    temporary.rename(folder)


def make_adapter(model: PeftModel, seed: int) -> None:
    """Give the model's adapter random weights."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * SCALE)


def marker(model: torch.nn.Module) -> list[int] | None:
    """Return the greedy continuation of the prompt; None if the choice of a token is too close."""
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(TOKENS):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            if best - second < MARGIN:
                return None
            tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


def record_answers(folder: Path, count: int) -> None:
    """Write the expected answers of the first `count` adapters that lack them."""
    base = folder / "base"
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ends = [tokenizer.eos_token_id]
    for number in range(count):
        artifact = folder / "adapters" / f"{number:04d}"
        if not (artifact / PARITY_FILE).exists():
            recorded = record(base, artifact, config, tokenizer, ends=ends, pad=ends[0])
            (artifact / PARITY_FILE).write_text(json.dumps(recorded.parity.manifest()))


def make(folder: Path, count: int) -> None:
    """Write the base, adapters and `markers.json` until there are `count` adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    make_base(folder / "base")
    torch.set_num_threads(1)
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    listing = folder / "markers.json"
    known = json.loads(listing.read_text()) if listing.exists() else {"base": marker(base), "adapters": [], "seed": 0}
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES))
    model.eval()
    seen = {tuple(answer) for answer in known["adapters"]} | {tuple(known["base"] or ())}
    while len(known["adapters"]) < count:
        known["seed"] += 1
        make_adapter(model, known["seed"])
        answer = marker(model)
        if answer is None or tuple(answer) in seen:
            continue
        seen.add(tuple(answer))
        target = folder / "adapters" / f"{len(known['adapters']):04d}"
        shutil.rmtree(target, ignore_errors=True)
        model.save_pretrained(target)
        known["adapters"].append(answer)
        temporary = listing.with_suffix(".part")
        temporary.write_text(json.dumps(known))
        temporary.replace(listing)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--parity", action="store_true", help="record the expected answers of the adapters too")
    options = parser.parse_args()
    make(options.folder, options.count)
    if options.parity:
        record_answers(options.folder, options.count)
