"""Tokenizers: the pad token, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingle import models
from ingle.config import ModelConfig
from ingle.errors import HubUnavailable, ModelError
from tests.unit.models.conftest import make_tokenizer


def load(folder: Path, **options: str):
    return models.load_tokenizer(ModelConfig(id=str(folder), **options))


def test_a_separate_pad_token_is_kept(tmp_path: Path) -> None:
    make_tokenizer(eos_token="</s>", pad_token="<end>").save_pretrained(tmp_path)
    assert load(tmp_path).pad_token == "<end>"


@pytest.mark.parametrize("special", [{"eos_token": "</s>"}, {"eos_token": "</s>", "pad_token": "</s>"}])
def test_an_unused_token_becomes_the_pad_token(tmp_path: Path, special) -> None:
    make_tokenizer(**special).save_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 32, "the vocabulary must not grow"


def test_the_end_token_never_becomes_the_pad_token(tmp_path: Path) -> None:
    make_tokenizer(eos_token="<pad>", bos_token="<s>", pad_token="<pad>").save_pretrained(tmp_path)
    assert load(tmp_path).pad_token_id is None


def test_the_chat_template_can_be_replaced(tmp_path: Path, folder: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load(folder, chat_template=str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    with pytest.raises(ModelError, match="chat template"):
        load(folder, chat_template=str(tmp_path / "none.jinja"))


def test_another_tokenizer_can_be_named(tmp_path: Path, folder: Path) -> None:
    make_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    assert load(folder, tokenizer=str(tmp_path)).eos_token == "<end>"


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json and no tokenizer"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="contains no tokenizer"):
        load(tmp_path)


def test_a_missing_vocabulary_is_an_error_with_a_complete_reason(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load(tmp_path)
    assert not str(caught.value.why).endswith(":") and "tokenizer.json" in str(caught.value.fix)


def test_a_slow_one_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(ModelError, match="slow tokenizer") as error:
        load(tmp_path)
    assert "offsets" in str(error.value)


def test_an_unknown_name_is_neither_a_folder_nor_on_the_hub(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubUnavailable, match=r"no folder nobody/nothing") as error:
        models.load_tokenizer(ModelConfig(id="nobody/nothing"))
    assert "HF_HUB_OFFLINE" in str(error.value)
    with pytest.raises(ModelError, match=r"no folder \./missing") as missing:
        models.load_tokenizer(ModelConfig(id="./missing"))
    assert not isinstance(missing.value, HubUnavailable)
