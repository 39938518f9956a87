"""docs/models.md holds what `accel info --models` prints. `python tests/docs/test_models.py` writes it."""

from __future__ import annotations

from pathlib import Path

from accel.cli.info import _models

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

What each denoiser of diffusers that is described here takes; every line is held to one suite on a tiny random checkpoint (`tests/families`): a plan
that only permutes the tokens changes nothing, presets run at two sizes, the pipeline is exactly restored, runs repeat themselves. Any other
denoiser takes forecasts, which need its prediction alone; to describe it is [one small file](adding/family.md).

```bash
accel info --models
```

- **forecasts**: `quality`, `balanced`, `fast`, `draft`, under [most samplers](measured/schedulers.md).
- **merging**: `merging`, `few-step`, `tomesd`, and how far tokens stay merged: from the first block to the last (`scope="span"`), in each block
  (`scope="block"`), or, between the convolutions of a U-Net, within a stack of its blocks.
- **pruning**: `TokenPruningConfig`; "no keys kept": with `keys_values="none"`.
- **branches**: `guidance_every` can leave the unconditional branch of guidance out.

"""


def table() -> str:
    rows = _models()
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]) + "\n"


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text(encoding="utf-8") == HEAD + table()


if __name__ == "__main__":
    PAGE.write_text(HEAD + table(), encoding="utf-8")
