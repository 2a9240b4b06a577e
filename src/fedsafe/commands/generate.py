"""`fedsafe generate`: try a trained adapter."""

from pathlib import Path

from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import CommandParser
from fedsafe.model.generation import generate_answers
from fedsafe.model.pretrained import load_trained


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments and answer."""
    quiet_known_noise()
    auto_cli(
        generate,
        args=arguments,
        prog=f"fedsafe {name}",
        as_positional=False,
        parser_class=CommandParser,
    )


def generate(
    adapter: str,
    prompt: str,
    base: str | None = None,
    max_new_tokens: PositiveInt = 128,
    temperature: NonNegativeFloat = 0.0,
    seed: int = 0,
) -> None:
    """Answer a prompt with a trained adapter.

    Args:
        adapter: Folder of the adapter in PEFT's format, such as `adapter/` of a run directory.
        prompt: What the user says.
        base: Hub name or folder of the base model; the default is the one the adapter names.
        max_new_tokens: Tokens at which the answer is cut off.
        temperature: 0 for the likeliest answer; above 0 to sample.
        seed: Seed of the sampling.
    """
    model, tokenizer = load_trained(Path(adapter), base=base)
    [answer] = generate_answers(
        model,
        tokenizer,
        [[{"role": "user", "content": prompt}]],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    print(answer)  # noqa: T201
