"""The table: what is wrong, how it comes about, and what the sentence must name."""

from collections.abc import Callable

import datasets
import huggingface_hub
import yaml

from tests.unit.malformed_box import GOOD_ROW, Box, Case, override, rows, setting, steps, text
from tests.unit.malformed_folders import ADAPTER, CHECKPOINT, MODEL


def yaml_folder(box: Box) -> None:
    box.config = box.folder / "settings"
    box.config.mkdir()


def yaml_near(box: Box) -> None:
    box.config = box.folder / "confg.yaml"


def key_twice(box: Box) -> None:
    box.text = (yaml.safe_dump(box.values) + "model:\n  name: other\n").encode()


CONFIG = [
    Case("config", "no such file", r"confg\.yaml.*did you mean .*/config\.yaml", yaml_near),
    Case("config", "a folder", r"settings is a folder.*YAML file", yaml_folder),
    Case("config", "empty file", r"config\.yaml holds no settings", text(b"")),
    Case("config", "a list", r"config\.yaml holds no settings", text(b"- model\n- data\n")),
    Case("config", "not YAML", r"config\.yaml, line 2: .*mend the YAML", text(b"model: {name: x\ndata: [1\n")),
    Case("config", "a tab", r"config\.yaml, line 2: .*mend the YAML", text(b"model:\n\tname: x\n")),
    Case("config", "not UTF-8", r"config\.yaml, line 2 is not UTF-8; save", text(b"seed: 1\nname: caf\xe9\n")),
    Case("config", "a NUL byte", r"config\.yaml.*mend the YAML", text(b"name: a\0b\n")),
    Case("config", "an unknown tag", r"config\.yaml, line 2: the tag !!python/object:os\.system is not read; remove it",
         text(b"seed: 1\nname: !!python/object:os.system x\n")),
    Case("config", "a list as a key", r"config\.yaml, line 1: a list or mapping cannot be a key; ",
         text(b"? [a, b]\n: 1\n")),
    Case("config", "a number as a key", r"3 is not a setting.*config\.yaml, line \d+",
         lambda box: box.values.update({3: "x"})),
    Case("config", "key written twice", r"config\.yaml, line \d+: the key 'model' is written twice", key_twice),
    Case("config", "unknown key", r"train\.max_stps.*line \d+.*max_steps", setting("train", max_stps=3)),
    Case("config", "another tool's key", r"lora_r .*adapter\.r\b", lambda box: box.values.update(lora_r=8)),
    Case("config", "text for a number", r"train\.max_steps is 'many' .*line \d+.*whole number",
         setting("train", max_steps="many")),
    Case("config", "out of range", r"adapter\.lora_dropout is 1\.5 .*less than 1",
         setting("adapter", lora_dropout=1.5)),
    Case("config", "no such choice", r"train\.optim is 'adam' .*paged_adamw_8bit", setting("train", optim="adam")),
    Case("config", "a section as a value", r"train is 3, but it is a section .*line \d+",
         lambda box: box.values.update(train=3)),
    Case("config", "model left out", r"model is missing .*config\.yaml", lambda box: box.values.pop("model")),
    Case("config", "contradiction", r"train\.max_steps and train\.num_train_epochs are both set; remove one",
         override("train.num_train_epochs=2")),
    Case("config", "override without value", r"'train\.max_steps' is no override; write section\.field=value",
         override("train.max_steps")),
    Case("config", "override of an empty field", r"'train\.=3' is no override", override("train.=3")),
    Case("config", "override below a value", r"model\.name is a value, not a section", override("model.name.x=3")),
    Case("config", "override that is not YAML", r"'seed=\[': .*quote the value", override("seed=[")),
    Case("config", "more workers than one process", r"launch\.num_workers is 2; set launch\.backend to ray or torchrun",
         override("launch.num_workers=2")),
]  # fmt: skip


DATA = [
    Case("data", "no such file", r"data\.train: .*gone\.jsonl does not exist; give the path",
         lambda box: setting("data", train=str(box.folder / "gone.jsonl"))(box)),
    Case("data", "empty file", r"data\.train: .*x\.jsonl holds no rows", rows("x.jsonl", b"")),
    Case("data", "a cut line", r"x\.jsonl:2 is not JSON .*column \d+", rows("x.jsonl", GOOD_ROW + b'{"question": "q')),
    Case("data", "UTF-16", r"x\.jsonl:1 is not UTF-8", rows("x.jsonl", GOOD_ROW.decode().encode("utf-16"))),
    Case("data", "an answer lacks", r"x\.jsonl:2 lacks the key `answer`",
         rows("x.jsonl", GOOD_ROW + b'{"question": "q"}')),
    Case("data", "unknown columns", r"x\.jsonl:1 fits no known format \(keys: body\)",
         rows("x.jsonl", b'{"body": "b"}')),
    Case("data", "an unknown role", r"x\.jsonl:1: messages\[0\] has the role 'narrator'",
         rows("x.jsonl", b'{"messages": [{"role": "narrator", "content": "x"}]}')),
    Case("data", "a short CSV row", r"x\.csv:3 has 1 cells", rows("x.csv", b"question,answer\nq,a\nq\n")),
    Case("data", "text named Parquet", r"x\.parquet is not a readable Parquet file", rows("x.parquet", GOOD_ROW)),
    Case("data", "a spreadsheet", r"x\.xlsx has \.xlsx, which tells no format", rows("x.xlsx", b"PK")),
    Case("data", "no such bundled data", r"data\.train: .*home_comands.*home_commands",
         setting("data", train="bundled:home_comands")),
    Case("data", "no such template", r"data\.chat_template: chatlm is neither",
         setting("data", chat_template="chatlm")),
    Case("data", "no room for an answer", r"data\.train: .*\(30 whose answer lies beyond max_length\)",
         setting("data", max_length=2)),
    Case("data", "more held out than there is", r"data\.eval_split=500 holds out 500 of 30 rows",
         setting("data", eval_split=500.0)),
    Case("data", "held-out file lacks", r"data\.eval: .*gone\.jsonl does not exist",
         setting("data", eval="gone.jsonl")),
    Case("data", "cache folder is a file", r"error: data\.cache_dir: .* cannot be written",
         lambda box: setting("data", cache_dir=str(box.write("tokens", b"")))(box)),
]  # fmt: skip


def hub(kind: str, section: str, field: str, name: str) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        address = box.serve(kind)
        box.patch.setenv("HF_ENDPOINT", address)
        box.patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(box.folder / "hub"))
        box.patch.setattr(datasets.config, "HF_ENDPOINT", address)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template.removeprefix(huggingface_hub.constants.ENDPOINT)
        box.patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + path)
        box.patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        box.secret("HF_TOKEN", "plantedhubtoken0123456789")
        box.values[section][field] = name

    return prepare


def s3(server: str, **environment: str) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        box.patch.setenv("AWS_ENDPOINT_URL", box.serve(server))
        box.patch.setenv("AWS_REGION", "us-east-1")
        for name, value in environment.items():
            box.secret(name, value)
        box.values["data"]["train"] = "s3://rows/x.jsonl"

    return prepare


def with_secret(section: str, field: str, value: str, *secrets: str) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        box.secrets.extend(secrets)
        box.values[section][field] = value

    return prepare


TOKEN = "hf_plantedtoken0123456789"
KEY = {"AWS_ACCESS_KEY_ID": "PLANTEDKEYID01234567", "AWS_SECRET_ACCESS_KEY": "plantedsecretkey/0123456789"}
CREDENTIALS = [
    Case("credentials", "S3 without any", r"data\.train: s3://rows/x\.jsonl .*AWS_ACCESS_KEY_ID", s3("strange")),
    Case("credentials", "S3 refuses them", r"data\.train: .*s3://rows/x\.jsonl .*denied", s3("s3", **KEY)),
    Case("credentials", "S3 in the address", r"data\.train holds credentials.*AWS_SECRET_ACCESS_KEY",
         with_secret("data", "train", "s3://PLANTEDID:plantedword@rows/x.jsonl", "PLANTEDID", "plantedword")),
    Case("credentials", "a password in data.eval", r"data\.eval holds credentials.*environment",
         with_secret("data", "eval", "https://me:plantedword@host/x.jsonl", "plantedword")),
    Case("credentials", "a token in model.name", r"model\.name: .* is a URL; give the hub id OWNER/NAME.*HF_TOKEN",
         with_secret("model", "name", "https://me:plantedword@huggingface.co/org/model", "plantedword")),
    Case("credentials", "a token as a file's name", r"data\.train: .*\*\*\*.*does not exist",
         with_secret("data", "train", f"{TOKEN}.jsonl", TOKEN)),
    Case("credentials", "a token in an unknown key",
         r"hub_token is not a setting, and no secrets .*line \d+\); .*HF_TOKEN",
         steps(lambda box: box.secrets.append(TOKEN), lambda box: box.values.update(hub_token=TOKEN))),
    Case("credentials", "a token in an override", r"seed is .*\*\*\*",
         steps(lambda box: box.secrets.append(TOKEN), override(f"seed={TOKEN}"))),
    Case("credentials", "a gated model", r"model\.name: org/model is gated.*HF_TOKEN",
         hub("gated", "model", "name", "org/model")),
    Case("credentials", "a private model", r"model\.name: org/model .*HF_TOKEN",
         hub("private", "model", "name", "org/model")),
    Case("credentials", "a refused token", r"model\.name: .*HF_TOKEN", hub("refused", "model", "name", "org/model")),
    Case("credentials", "gated data", r"data\.train: .*org/data .*HF_TOKEN", hub("gated", "data", "train", "org/data")),
]  # fmt: skip

CASES = [*CONFIG, *DATA, *MODEL, *ADAPTER, *CHECKPOINT, *CREDENTIALS]
