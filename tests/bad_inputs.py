"""Randomised inputs that must be refused, over all commands: drawn from a seed, so that a case's id finds it again.

A case is (id, arguments, files): what to write into its folder first, and what to type. "{}" in an argument stands
for that folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from accel.pipelines.builtin import AUTOREGRESSIVE_FOLDER, FOLDER

SEED = 20_261_126
MODEL = "model"  # the name, in a case's folder, of a linked copy of a built-in model


@dataclass
class Case:
    """One command that must end with code 2 and one line.

    Attributes:
        kind: the function that drew it.
        files: name -> content, written into the case's folder.
        copy: a model's folder, linked as `model`, in which `files` then take the place of what was there.
        without: files to delete of it.
    """

    kind: str
    arguments: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    copy: Path | None = None
    without: tuple[str, ...] = ()

    def prepare(self, folder: Path) -> list[str]:
        if self.copy:
            shutil.copytree(self.copy, folder / MODEL, copy_function=_link)
        for name in (*self.files, *self.without):  # a link's other end must stay as it is
            (folder / name).unlink(missing_ok=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return [argument.replace("{}", str(folder)) for argument in self.arguments]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copyfile(source, target)


WORDS = [
    "star",
    "[/x]",
    "[bold]red",
    "\x1b[31mred\x1b[0m",
    ":boom:",
    "a\rb",
    "\u202etxt",
    "猫",
    "%s{}",
    "`x`",
    "**b**",
]


def word(r: random.Random) -> str:
    return r.choice(WORDS).replace("{}", "") + str(r.randrange(1000))


def command(r: random.Random) -> list[str]:
    """A command that would run, for options that it must refuse."""
    return r.choice(
        (
            ["generate", word(r), "--out", "{}/out"],
            ["demo", "--out", "{}/out"],
            ["evaluate", "run", "{}/run"],
            ["evaluate", "all", "{}/run"],
        )
    )


def huge(r: random.Random) -> str:
    return str(r.choice((10**9, 2**63, 2**64, 10**30, 10**400)) + r.randrange(9))


def seed(r: random.Random) -> Case:
    bad = r.choice(
        (str(-r.randrange(1, 10**9)), str(2**63 + r.randrange(9)), str(2**64), "1.5", "nan", "0x1f", "")
    )
    bench = [["bench", "peers", "{}/b"], ["bench", "ar", "{}/b"]]
    return Case("seed", [*r.choice([command(r), *bench]), "--seed", bad])


def seeds_run_out(r: random.Random) -> Case:
    many = r.randrange(2, 50)
    first = str(2**63 - r.randrange(1, many))
    return Case("seeds_run_out", ["generate", word(r), "--out", "{}/o", "--num", str(many), "--seed", first])


def steps(r: random.Random) -> Case:
    bad = r.choice(("0", str(-r.randrange(1, 99)), huge(r), "1.5", "many", "nan", ""))
    return Case("steps", [*r.choice((command(r), ["bench", "peers", "{}/b"])), "--steps", bad])


def size(r: random.Random) -> Case:
    n = r.randrange(1, 999)
    bad = (
        f"0x{n}",
        f"{n}x0",
        f"-{n}",
        f"{n}x",
        f"x{n}",
        f"{n}x{n}x{n}",
        huge(r),
        f"{n}x{huge(r)}",
        "٦٤",
        "1e3",
        "",
        "6_4",
    )
    return Case("size", ["generate", word(r), "--out", "{}/o", "--size", r.choice(bad)])


def size_in_evaluation(r: random.Random) -> Case:
    bad = r.choice(("0", "-64", "64x", "abc", huge(r), "16385", "64x64x64"))
    if r.random() < 0.5:
        return Case("size_in_evaluation", ["bench", "peers", "{}/b", "--size", bad])
    return Case("size_in_evaluation", ["evaluate", "run", "{}/run", "--size", bad])


def size_of_the_model(r: random.Random) -> Case:
    bad = 8 * r.randrange(8, 20) + r.randrange(1, 8)
    return Case("size_of_the_model", ["generate", "a star", "--out", "{}/o", "--size", str(bad)])


def guidance(r: random.Random) -> Case:
    bad = r.choice(("nan", "inf", "-inf", f"-{r.random()}", "1e9", "1e400", "high", ""))
    return Case("guidance", [*command(r), f"--guidance={bad}"])


def sampling(r: random.Random) -> Case:
    option, values = r.choice(
        (
            ("--temperature", ("nan", "inf", "-1", "x")),
            ("--top-k", ("0", "-5", "1.5", "x")),
            ("--top-p", ("0", "1.5", "nan", "-inf", "x")),
        )
    )
    start = r.choice(
        (["generate", word(r), "--out", "{}/o"], ["demo", "--ar", "--out", "{}/o"], ["bench", "ar", "{}/b"])
    )
    return Case("sampling", [*start, f"{option}={r.choice(values)}"])


def counts(r: random.Random) -> Case:
    option = r.choice(("--num", "--batch"))
    bad = (
        r.choice(("0", "-1", "x", "1.5"))
        if option == "--batch"
        else r.choice(("0", "-3", "x", str(10**9), str(10**30)))
    )
    return Case("counts", ["generate", word(r), "--out", "{}/o", option, bad])


def device(r: random.Random) -> Case:
    bad = r.choice(
        ("quantum", "meta", "cuda:99", "cpu:x", "", "cuda:-1", "xla", "[/x]", "\x1b[2J", "mps:7", "cpu,cuda")
    )
    return Case("device", [*command(r), "--device", bad])


def dtype(r: random.Random) -> Case:
    bad = r.choice(("int8", "float", "", "[red]", "bfloat", "torch.float32", "float64"))
    return Case("dtype", ["generate", word(r), "--out", "{}/o", "--dtype", bad])


def preset(r: random.Random) -> Case:
    bad = r.choice(("balancd", "", "[/]", "../balanced", "Balanced", "\x1b[1m", word(r)))
    if r.random() < 0.3:
        return Case("preset", ["evaluate", "run", "{}/run", "-c", "x" + word(r).strip("\r")])
    return Case(
        "preset",
        [*r.choice((["generate", word(r)], ["demo"])), "--preset", bad, "--out", "{}/o"],
    )


def usage(r: random.Random) -> Case:
    bad = (
        ["generate"],
        ["genrate", word(r)],
        ["generate", word(r), "--stpes", "3"],
        ["generate", word(r), "--steps"],
        ["demo", word(r)],
        ["info", word(r)],
        ["info", "--preset", "x"],
        ["evaluate", "rum", "{}/r"],
        ["evaluate", "report"],
        ["evaluate", "score"],
        ["evaluate", "official"],
        ["bench", "peers"],
        ["bench", word(r)],
        ["generate", word(r), "--compare", "--out", "{}/o"],
        ["generate", word(r), "--preset", "fast", "--config", "{}/c.yaml"],
        [f"--{word(r)}"],
        ["generate", "a\udcffb", "--out", "{}/o"],
    )
    return Case("usage", list(r.choice(bad)))


def yaml_text(r: random.Random) -> bytes:
    """Text that is no configuration."""
    n = r.randrange(2, 9)
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(n)
    )
    return r.choice(
        (
            b"",
            b"- method: forecast\n",
            b"just words\n",
            b"42\n",
            b"null\n",
            b"\xff\xfe\x00m",
            b"method: [forecast\n",
            b"method: forecast\n\tcycle: [0, 1]\n",
            b"method: forecast\ncycle: [0, 1]\norder: 1\norder: 2\n",
            b"method: forecast\nmethod: token_merging\n",
            b"method: " + b"[" * 3000 + b"]" * 3000,
            b"{" + b"a: {" * 3000,
            bomb.encode(),
            f"method: token_merging\nratio: &r 0.{n}\nprotect: *r\n".encode(),
            b"method: !!python/object/apply:os.system [echo]\n",
            b"method: forecast\n--- \nmethod: forecast\n",
            b"method: magic\n",
            b"method: {a: b}\n",
            b"ratio: 0.5\n",
            b"method: token_merging\nratoi: 0.5\n",
            b"method: token_merging\n? [a, b]\n: 1\n",
            b"method: token_merging\n1: 2\n",
            f"method: token_merging\nratio: {r.choice(('.nan', '.inf', '-1', '1', '2', '[0.5]', 'half', '{a: 1}', 'null'))}\n".encode(),
            f"method: token_merging\nscope: {r.choice(('[span]', '{span: 1}', '3', 'null', 'spam'))}\n".encode(),
            f"method: forecast\ncycle: {r.choice(('[]', '3', '[0, 2]', '[[0], 1]', 'true', '[.nan]', '{0: 1}', '[1, 1]'))}\n".encode(),
            f"method: forecast\norder: {r.choice(('3', '-1', '1.5', 'true', '2001-99-99', '9' * 5000))}\n".encode(),
            f"method: token_pruning\nbudget: {r.choice(('.nan', '-1', 'x', '[1]', '!!int x'))}\n".encode(),
            f"method: speculative_decoding\nwindow: {r.choice(('0', '-1', '1.5', 'wide', '[4]', '.inf'))}\n".encode(),
            b"\x00\x01\x02",
            b"method: forecast\xc2\x85\x0b",
        )
    )


def config(r: random.Random) -> Case:
    name = r.choice(("mine.yaml", "[bold].yaml", "a b.yml", "\x1b[31m.yaml"))
    start = r.choice((["generate", word(r)], ["demo"]))
    return Case("config", [*start, "--config", f"{{}}/{name}", "--out", "{}/o"], {name: yaml_text(r)})


def config_of_a_run(r: random.Random) -> Case:
    return Case(
        "config_of_a_run", ["evaluate", "run", "{}/run", "-c", "{}/mine.yaml"], {"mine.yaml": yaml_text(r)}
    )


def config_file(r: random.Random) -> Case:
    bad = r.choice(("{}/absent.yaml", "{}", "/dev/zero", "{}/c.yaml/x", "{}/" + "n" * 300 + ".yaml"))
    return Case(
        "config_file",
        ["generate", word(r), "--out", "{}/o", "--config", bad],
        {"c.yaml": b"method: forecast\n"},
    )


def out(r: random.Random) -> Case:
    bad = r.choice(
        ("{}/file", "{}/file/below", "{}/" + "n" * 300, "/dev/null", "/proc/none/x", "{}/./file/[/x]")
    )
    start = r.choice((["generate", word(r)], ["demo"]))
    return Case("out", [*start, "--out", bad], {"file": b""})


def out_of_a_run(r: random.Random) -> Case:
    bad = r.choice(("{}/file", "{}/file/below", "/dev/null"))
    options = ["--suite", "{}/p.txt", "--steps", "1", "--size", "64", "--warmup", "0"]
    return Case("out_of_a_run", ["evaluate", "run", bad, *options], {"file": b"", "p.txt": b"a star\n"})


def model(r: random.Random) -> Case:
    bad = r.choice(
        (
            "./none",
            "",
            "a/b/c",
            "no/body",
            "{}/file",
            "{}/empty",
            "~/x",
            "[/x]/[y]",
            "\x1b[31m/x",
            "http://x/y",
            "..",
            "a b/c",
        )
    )
    start = r.choice(
        (
            ["generate", "star", "--out", "{}/o"],
            ["evaluate", "run", "{}/run"],
            ["bench", "peers", "{}/b"],
            ["bench", "ar", "{}/b"],
        )
    )
    return Case("model", [*start, "--model", bad], {"file": b"", "empty/x": b""})


def damaged(content: bytes, r: random.Random) -> bytes:
    """A JSON file that no more says what it said, or is none."""
    text = content.decode()
    data = json.loads(text)
    key = r.choice(sorted(data))
    return r.choice(
        (
            b"",
            content[: r.randrange(1, len(content) - 2)],
            b"[]",
            b"null",
            b'"text"',
            b"\xff\xfe" + content,
            b"[" * 3000,
            b'{"a":' * 3000,
            ('{"%s": 1, ' % key + text.lstrip().removeprefix("{")).encode(),  # noqa: UP031 - braces
        )
    )


def broken_json(r: random.Random) -> Case:
    base = r.choice((FOLDER, AUTOREGRESSIVE_FOLDER))
    names = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
    if base == FOLDER:
        names = [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "vae/config.json",
            "transformer/config.json",
        ]
        names += ["text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/tokenizer.json"]
        names += ["tokenizer_2/tokenizer_config.json"]
    name = r.choice(names)
    content = damaged((base / name).read_bytes(), r)
    return Case("broken_json", _use(r), {f"{MODEL}/{name}": content}, base)


def broken_weights(r: random.Random) -> Case:
    base = r.choice((FOLDER, AUTOREGRESSIVE_FOLDER))
    # Beside the index are side-cars, which are no part of the folder's pipeline.
    beside = base if base == FOLDER else None
    file = r.choice(sorted(f for f in base.rglob("*.safetensors") if f.parent != beside))
    name = f"{MODEL}/{file.relative_to(base)}"
    if r.random() < 0.3:
        return Case("broken_weights", _use(r), {}, base, (name,))
    content = file.read_bytes()
    bad = r.choice(
        (b"", content[: r.randrange(9, 4000)], content[:-5], b"\xff" * 64, b"PK\x03\x04", content[8:])
    )
    return Case("broken_weights", _use(r), {name: bad}, base)


def missing_parts(r: random.Random) -> Case:
    names = ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "tokenizer/tokenizer_config.json"]
    names += [
        "text_encoder/config.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ]
    return Case("missing_parts", _use(r), {}, FOLDER, (f"{MODEL}/{r.choice(names)}",))


def unknown_classes(r: random.Random) -> Case:
    index = json.loads((FOLDER / "model_index.json").read_text())
    name, value = r.choice(
        (
            ("_class_name", "My" + "".join(r.choices("abc", k=4))),
            ("_class_name", 3),
            ("_class_name", ["pipeline", "Mine[/x]"]),
            ("_class_name", "StableDiffusionPipeline"),
            ("transformer", ["diffusers", "Transformer9"]),
            ("transformer", ["os", "system"]),
            ("vae", ["../..", "AutoencoderKL"]),
            ("vae", ["diffusers"] * 3),
            ("text_encoder", ["transformers", "[/bold]"]),
            ("tokenizer", ["transformers", "CLIPTextModel"]),
            ("scheduler", ["diffusers", "logging"]),
        )
    )
    files = {f"{MODEL}/model_index.json": json.dumps({**index, name: value}).encode()}
    return Case("unknown_classes", _use(r), files, FOLDER)


def wrong_config(r: random.Random) -> Case:
    """Valid JSON that does not fit the weights, or makes a constructor fail."""
    part, key, value = r.choice(
        (
            ("transformer", "num_attention_heads", r.randrange(5, 9)),
            ("transformer", "in_channels", "many"),
            ("transformer", "axes_dims_rope", None),
            ("vae", "block_out_channels", []),
            ("vae", "latent_channels", 5),
            ("text_encoder", "hidden_size", 7),
            ("text_encoder", "num_hidden_layers", 99),
            ("text_encoder_2", "num_layers", 77),
            ("text_encoder_2", "d_model", "x"),
            ("text_encoder_2", "vocab_size", 10),
        )
    )
    data = json.loads((FOLDER / part / "config.json").read_text())
    files = {f"{MODEL}/{part}/config.json": json.dumps({**data, key: value}).encode()}
    return Case("wrong_config", _use(r), files, FOLDER)


def _use(r: random.Random) -> list[str]:
    start = r.choice((["generate", "star", "--out", "{}/o"], ["evaluate", "run", "{}/run", "--limit", "1"]))
    return [*start, "--steps", "1", "--size", "64", "--model", "{}/" + MODEL][:None]


def bench(r: random.Random) -> Case:
    bad = (
        ["bench", "peers", "{}/b", "--only", "["],
        ["bench", "peers", "{}/b", "--only", "(?P<"],
        ["bench", "peers", "{}/b", "--only", word(r) + "none"],
        ["bench", "peers", "{}/b", "--limit", "0"],
        ["bench", "ar", "{}/b", "--batch-sizes", r.choice(("0", "x", "1,,2", "-1", "1.5", "", huge(r), "٣"))],
        ["bench", "ar", "{}/b", "--window", r.choice(("1", "0", "x"))],
        ["bench", "ar", "{}/b", "--repeats", "0"],
        ["bench", "ar", "{}/b", "--seeds", "0"],
        ["bench", "ar", "{}/b", "--only", "*"],
    )
    return Case("bench", list(r.choice(bad)))


def evaluation(r: random.Random) -> Case:
    bad = (
        ["evaluate", "run", "{}/run", "--limit", "0"],
        ["evaluate", "run", "{}/run", "--per-task", r.choice(("0", "-1", "x"))],
        ["evaluate", "run", "{}/run", "--samples", "0"],
        ["evaluate", "run", "{}/run", "--batch-size", "0"],
        ["evaluate", "run", "{}/run", "--warmup", "-1"],
        ["evaluate", "run", "{}/run", "--suite", "{}/absent.txt"],
        ["evaluate", "run", "{}/run", "--suite", "{}"],
        ["evaluate", "run", "{}/run", "--suite", "{}/empty.txt"],
        ["evaluate", "run", "{}/run", "--suite", "geneval"],
        ["evaluate", "run", "{}/run", "--suite", "geneval", "--metadata", "{}/absent.jsonl"],
        ["evaluate", "run", "{}/run", "-c", "balanced,nothing=3"],
        ["evaluate", "run", "{}/run", "-c", "steps=x"],
        ["evaluate", "run", "{}/run", "-c", "steps=4", "-c", "steps=4"],
        ["evaluate", "run", "{}/run", "-c", "a/b:balanced,"],
        ["evaluate", "score", "{}/none"],
        ["evaluate", "score", "{}/run", "--images", "nofolder"],
        ["evaluate", "score", "{}/run", "--images", "a={}/none"],
        ["evaluate", "score", "{}/run", "--images", "a={}"],
        ["evaluate", "score", "{}/run", "--batch-size", "0"],
        ["evaluate", "all", "{}/run", "--extractor", word(r)],
        ["evaluate", "all", "{}/run", "--lpips", "{}/none.pth"],
        ["evaluate", "all", "{}/run", "--reference", "{}/none"],
        ["evaluate", "report", "{}/none"],
        ["evaluate", "report", "{}", "--worst", "-1"],
        ["evaluate", "official", "{}/none.jsonl"],
        ["evaluate", "official", "{}"],
    )
    return Case("evaluation", list(r.choice(bad)), {"empty.txt": b" \n\n"})


def inline_settings(r: random.Random) -> Case:
    value = r.choice(("[", "{a: b", "&a [*a]", "'", "2001-99-99", "!!int x", "[0.5]", ".nan"))
    return Case("inline_settings", ["evaluate", "run", "{}/run", "-c", f"mine:merging,ratio={value}"])


def metadata(r: random.Random) -> Case:
    bad = r.choice(
        (
            b"[]\n",
            b"3\n",
            b"{\n",
            b"{}\n",
            b"null\n",
            b"[" * 3000 + b"\n",
            b"\xff\n",
            b'{"tag": 1, "prompt": []}\n',
        )
    )
    start = ["evaluate", "run", "{}/run", "--suite", "geneval", "--metadata", "{}/m.jsonl"]
    return Case("metadata", start, {"m.jsonl": bad})


def official(r: random.Random) -> Case:
    bad = r.choice((b"[]\n", b"3\n", b"{\n", b"{}\n", b"null\n", b"[" * 3000 + b"\n", b"\xff\xfe\n", b""))
    return Case("official", ["evaluate", "official", "{}/o.jsonl"], {"o.jsonl": bad})


def run_folder(r: random.Random) -> Case:
    bad = r.choice(
        (b"", b"[]", b"3", b"null", b"{", b"{}", b"[" * 3000, b"\xff\xfe", b'{"suite": 3}', b'{"format": 99}')
    )
    stage = r.choice(("score", "report"))
    return Case("run_folder", ["evaluate", stage, "{}/run"], {"run/run.json": bad})


#: How many of each kind are drawn.
KINDS: dict[Callable[[random.Random], Case], int] = {
    seed: 12,
    seeds_run_out: 3,
    steps: 12,
    size: 12,
    size_in_evaluation: 6,
    size_of_the_model: 2,
    guidance: 12,
    sampling: 10,
    counts: 8,
    device: 12,
    dtype: 6,
    preset: 8,
    usage: 16,
    config: 40,
    config_of_a_run: 12,
    config_file: 6,
    out: 8,
    out_of_a_run: 3,
    model: 14,
    broken_json: 24,
    broken_weights: 12,
    missing_parts: 5,
    unknown_classes: 10,
    wrong_config: 10,
    bench: 12,
    evaluation: 30,
    inline_settings: 6,
    metadata: 6,
    official: 6,
    run_folder: 8,
}


def cases(start: int = SEED) -> Iterator[tuple[str, Case]]:
    """(id, case); a kind's cases do not depend on the other kinds."""
    for draw, count in KINDS.items():
        for number in range(count):
            yield f"{draw.__name__}-{number}", draw(random.Random(f"{start} {draw.__name__} {number}"))
