"""
Continue text with a trained model.

    python sample.py                                             the newest run with signals
    python sample.py --run=out/reflow-1 --prompt="The capital of France is" --num_samples=5 --temperature=0
    python sample.py --prompt=FILE:story.txt --top_p=0.95 --seed=7
    python sample.py --steer="+God:0.15@0-2,-s17:0.1@1" --compare   also without steering, by the same seed
    python sample.py --run=out/smollm2 --chat --prompt="Why is the sky blue?" --num_samples=1

All samples are generated together; the first is shown as it grows. A sample ends at <|endoftext|>.

--steer pushes the model towards (+) or away from (-) words or signals, as the experiments do: `+joy:0.5@0-2`
adds the embedding of " joy", scaled to half the length of the stream, to the stream entering layers 0, 1
and 2, at every position. `s17` is signal 17; the layer after the last block is the final norm. A word must be
one token. One item after another is added to the same layer, each in lengths of the stream as it then is.
"""

import codecs
import re
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import threads
import torch

import checkpoint
import configurator
import hooks
import reflow
from configurator import UserError
from data.datasets import COUNTS, dataset_of, run_words
from data.tokenizer import kept
from data.words import SHOWN_COUNT, sightings
from hardware import pick_device, pick_dtype, pick_threads

ITEM = re.compile(r"([+-])(\S+?):(\d+(?:\.\d*)?|\.\d+)@(\d+)(?:-(\d+))?")  # of --steer


@dataclass
class SampleConfig:
    run: str | None = None  # a run's folder or one of its step_... folders; None: the newest with signals
    prompt: str = "The American people"  # text to continue, or FILE:path; empty: a new document
    num_samples: int = 2  # samples, generated together
    max_new_tokens: int = 100  # tokens a sample may add
    temperature: float = 0.8  # below 1 is safer, above 1 wilder; 0 always takes the likeliest token
    top_k: int | None = 200  # sample among the k likeliest tokens only; 0 or None: all
    top_p: float | None = None  # sample among the likeliest tokens that hold this much probability; None: all
    chat: bool = False  # the prompt is a question: wrapped in the model's own template; the answer is printed
    steer: str | None = None  # sign, word or signal, strength, layers: "+joy:.5@0-2,-s17:.5@1"; None: nothing
    compare: bool = False  # with --steer: the same samples without it first
    seed: int = 0  # of the samples
    verify: bool = False  # check the SHA-256 of weights above 64 MiB too; of smaller ones it always is
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 if the hardware has it, fp16 on older GPUs

    def __post_init__(self):
        configurator.check(
            self,
            "1 <= num_samples <= 10_000",
            "max_new_tokens >= 1",
            "temperature == 0 or 0.001 <= temperature <= 1000",
            "top_k >= 0",
            "0 < top_p <= 1",
            configurator.SEED,
        )
        if self.compare and self.steer is None:
            raise ValueError("--compare shows text without and with steering: give --steer too")


def read_prompt(prompt):
    """The text that --prompt means. UserError if its file cannot be read."""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or f"no text in UTF-8: {error}"
        raise UserError(f"--prompt={prompt}: {why}") from None


def chat_prompt(text, state):
    """A question as the chat template of a run has it. UserError if it has none, or one that fails."""
    if "chat_template" not in state:
        raise UserError("--chat: this model has no chat template: it continues text, leave --chat out")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template is a stranger's

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": text}]
    try:
        template = environment.from_string(state["chat_template"])
        return template.render(messages=messages, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"--chat: the model's chat template fails: {error}") from None


def read_steering(text, model, tokenizer):
    """What --steer means: (direction (d,), strength, layers) for each item, as in `hooks.steer`."""
    found, last = [], model.config.n_layer
    for item in text.split(","):
        parts = ITEM.fullmatch(item.strip())
        where = f"--steer: {item.strip()!r}"
        if not parts:
            raise UserError(f"{where} is not like +joy:0.5@0-2 (sign, word or signal, strength, layers)")
        sign, name, strength, start, stop = parts.groups()
        layers = range(int(start), int(stop or start) + 1)
        if not layers or layers[-1] > last:
            raise UserError(f"{where}: layers go up from 0 to {last}, the final norm")
        try:
            direction = reflow.direction(model, reflow.signal_or_word(name), tokenizer)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if float(strength) > 1000:
            raise UserError(f"{where}: the strength counts norms of the stream: at most 1000")
        found.append((direction, float(sign + strength), layers))
    return found


def steered(model, steering):
    """A context in which the model is steered by what --steer means, see `read_steering`."""
    stack = ExitStack()
    for direction, strength, layers in steering:
        stack.enter_context(hooks.steer(model, direction, strength, layers))
    return stack


def note_rare_words(text, path, state):
    """Say which words of --steer were rare in training, if the text of a checkpoint's run is here."""
    named = [ITEM.fullmatch(item.strip())[2] for item in text.split(",")]
    named = [name for name in named if isinstance(reflow.signal_or_word(name), str)]
    if named and ((path / COUNTS).exists() or dataset_of(state) is not None):
        words = run_words(path, state)
        for name in named:
            n = words.counts[words.tokenizer.token_id(name, len(words.counts))]
            if n < SHOWN_COUNT:
                said = f"--steer: {name} was {sightings(n)} in {words.where}: its embedding may say little"
                print(said, file=sys.stderr)


def write_samples(model, tokenizer, prompt, text, stop, c):
    """Generate and print samples behind `text`, the first as it grows; how many tokens they have.

    A sample ends at the token `stop`.
    """
    how = {"temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p, "stop": stop}
    generator = torch.Generator(model.norm.weight.device).manual_seed(c.seed)
    samples = [[] for _ in range(c.num_samples)]
    show = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
    print(text, end="", flush=True)
    for tokens in model.stream([prompt] * c.num_samples, c.max_new_tokens, generator=generator, **how):
        for sample, token in zip(samples, tokens, strict=True):
            if token is not None and token != stop:
                sample.append(token)
        if tokens[0] is not None and tokens[0] != stop:
            print(show.decode(tokenizer.token_bytes(tokens[0])), end="", flush=True)
    print(show.decode(b"", final=True))
    for sample in samples[1:]:
        print("-" * 40)
        print(text + tokenizer.decode(sample))
    return sum(map(len, samples))


def main():
    (c,) = configurator.parse(SampleConfig)
    text = shown = read_prompt(c.prompt)
    step = checkpoint.find(c.run)
    device = pick_device(c.device)
    model, state = checkpoint.load_model(step, device, c.verify)
    model.to(pick_dtype(device, c.dtype))
    if device.type == "cpu":
        pick_threads(model, c.num_samples)

    tokenizer = kept(step, state)
    stop = tokenizer.end_of_text
    if c.chat:
        text, stop, shown = chat_prompt(text, state), state["end_of_turn"], ""
    # A document begins after the last one's end.
    prompt = tokenizer.encode_prompt(text) or [tokenizer.end_of_text]
    if not text:
        print("empty prompt: starting a new document", file=sys.stderr)
    if len(prompt) > model.config.block_size:
        print(f"prompt of {len(prompt)} tokens: only the last {model.config.block_size} fit", file=sys.stderr)
        prompt = prompt[-model.config.block_size :]

    steering = []
    if c.steer is not None:
        steering = read_steering(c.steer, model, tokenizer)  # a mistake is an error now
        note_rare_words(c.steer, step, state)
    n, start = 0, time.perf_counter()
    if c.compare:
        print("== without --steer")
        n += write_samples(model, tokenizer, prompt, shown, stop, c)
        print(f"\n== with --steer={c.steer}")
    with steered(model, steering):
        n += write_samples(model, tokenizer, prompt, shown, stop, c)
    seconds = time.perf_counter() - start
    loss = state["whole_val_loss"] or state["val_loss"]
    print(f"\n{n} tokens in {seconds:.1f} s from {step}", file=sys.stderr)
    print(f"validation loss {loss:.4f}, {state['bits_per_byte']:.4f} bits per byte", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main)
