"""`align chat` with a model that thinks: what is printed, and what later turns see."""

from typing import Any

import pytest
import torch

from align.cli import chat as command
from align.cli.chat import NO_ANSWER, chat
from tests.unit.data.test_answers import tokenizer_of


class Scripted:
    """A language model that writes given texts and keeps the prompts that it was given."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.device = torch.device("cpu")
        self.tokenizer, self.texts, self.prompts = tokenizer, iter(texts), []

    def to(self, device: torch.device) -> "Scripted":
        return self

    def generate(self, ids: torch.Tensor, streamer: Any, **options: Any) -> None:
        self.prompts.append(self.tokenizer.decode(ids[0]))
        streamer.put(ids)
        for token in self.tokenizer(next(self.texts))["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()


def talk(monkeypatch: pytest.MonkeyPatch, template: str, texts: list[str]) -> Scripted:
    tokenizer = tokenizer_of(template)
    model = Scripted(tokenizer, texts)
    monkeypatch.setattr(command, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(command, "load_causal_lm", lambda folder, dtype: model)
    monkeypatch.setattr(command, "stop_token_ids", lambda *_: (tokenizer.eos_token_id,))
    monkeypatch.setattr(command, "_lines", lambda: iter(f"question {number}" for number in range(len(texts))))
    chat("some/model")
    return model


@pytest.mark.parametrize(
    ("template", "thought"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\n"),
        ("gptoss", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_a_thought_is_printed_and_later_turns_see_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], template: str, thought: str
) -> None:
    model = talk(monkeypatch, template, [f"{thought}On the mat.<|im_end|>", f"{thought}Yes.<|im_end|>"])
    assert capsys.readouterr().out == f"{thought}On the mat.\n{thought}Yes.\n"
    assert "On the mat." in model.prompts[1] and "hm" not in model.prompts[1]


def test_a_thought_that_was_cut_is_no_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = talk(monkeypatch, "qwen3", ["<think>\nhm", "Yes.<|im_end|>"])
    assert capsys.readouterr().err == f"{NO_ANSWER}\n"
    assert "hm" not in model.prompts[1] and "question 0" not in model.prompts[1]
