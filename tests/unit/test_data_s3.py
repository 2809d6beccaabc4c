"""Rows from S3, read from a real server of its protocol on this machine."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from moto.server import ThreadedMotoServer
from transformers import AutoTokenizer

from qlora_dist.config.errors import UserError
from qlora_dist.data.sources import read_rows
from tests.unit.test_data_sources import QUESTIONS, tokens_of, write_csv, write_jsonl

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("s3")
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    client.create_bucket(Bucket="rows")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS), folder / "x.parquet")
    for key, path in {
        "one/x.jsonl": write_jsonl(folder / "x.jsonl", QUESTIONS),
        "two/train-0.jsonl": write_jsonl(folder / "a.jsonl", QUESTIONS[:1]),
        "two/train-1.csv": write_csv(folder / "b.csv", QUESTIONS[1:]),
        "two/test.jsonl": write_jsonl(folder / "c.jsonl", QUESTIONS[:1]),
        "three/x.parquet": folder / "x.parquet",
        "bad/x.jsonl": write_jsonl(folder / "d.jsonl", [{"question": "q"}]),
    }.items():
        client.upload_file(str(path), "rows", key)
    client.put_object(Bucket="rows", Key="notes/readme.txt", Body=b"hi")
    return "s3://rows"


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_objects_and_prefixes_give_the_tokens_of_the_local_file(bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = tokens_of(str(write_jsonl(tmp_path / "x.jsonl", QUESTIONS)), tokenizer)
    for key in ("one/x.jsonl", "one", "one/", "two", "three/x.parquet"):
        found = tokens_of(f"{bucket}/{key}", tokenizer)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), key


def test_splits_and_names(bucket: str) -> None:
    assert [row.where for row in read_rows(f"{bucket}/two", split="eval")] == ["s3://rows/two/test.jsonl:1"]
    assert len(read_rows(f"{bucket}/two", max_rows=2)) == 2
    assert read_rows(f"{bucket}/three")[1].where == "s3://rows/three/x.parquet, row 2"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("s3://rows/none.jsonl", r"data\.train: there is nothing at s3://rows/none\.jsonl; mend the bucket or the key"),
        ("s3://nobucket/x.jsonl", r"there is nothing at s3://nobucket/x\.jsonl; mend the bucket"),
        ("s3://", r"s3:// names no bucket; write s3://BUCKET/KEY"),
        ("s3://rows/notes", r"s3://rows/notes holds no file that ends in \.jsonl"),
        ("s3://rows/notes/readme.txt", r"readme\.txt has \.txt, which tells no format; use one of"),
    ],
)
def test_what_is_not_there(bucket: str, source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_rows(source)


def test_missing_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"needs AWS credentials and none are set; set AWS_ACCESS_KEY_ID and"):
        read_rows(f"{bucket}/one/x.jsonl")


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the store of s3://rows/x\.jsonl does not answer; check the network"):
        read_rows("s3://rows/x.jsonl")
