"""One small row, or a few, of each layout that people keep data in, for tests."""

from typing import Any

QUESTION, GOOD, BAD = "Name a river.", "The Danube.", "Seven."
USER = {"role": "user", "content": QUESTION}
CHOSEN, REJECTED = ({"role": "assistant", "content": text} for text in (GOOD, BAD))
SAID = {"from": "human", "value": QUESTION}

PAIRS: dict[str, list[dict[str, Any]]] = {
    "prompt, chosen, rejected": [{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}],
    "chosen, rejected (implicit prompt)": [{"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}],
    "hh-rlhf": [
        {
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
        }
    ],
    "scored pairs (UltraFeedback, binarised)": [
        {
            "prompt": QUESTION,
            "prompt_id": "a1",
            "chosen": [USER, CHOSEN],
            "rejected": [USER, REJECTED],
            "messages": [USER, CHOSEN],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        }
    ],
    "UltraFeedback": [
        {
            "source": "sharegpt",
            "instruction": QUESTION,
            "models": ["a", "b", "c"],
            "completions": [
                {"response": "A river.", "overall_score": 10.0, "fine-grained_score": 3.0, "model": "a"},
                {"response": GOOD, "overall_score": 8.0, "fine-grained_score": 4.75, "model": "b"},
                {"response": BAD, "overall_score": 1.0, "fine-grained_score": 1.25, "model": "c"},
            ],
        }
    ],
    "HelpSteer 2": [
        {"prompt": QUESTION, "response": BAD, "helpfulness": 0, "correctness": 0, "verbosity": 1},
        {"prompt": QUESTION, "response": GOOD, "helpfulness": 4, "correctness": 4, "verbosity": 1},
    ],
    "HelpSteer 2 (preferences)": [
        {"split": "train", "prompt": QUESTION, "response_1": BAD, "response_2": GOOD, "preference_strength": 2}
    ],
    "HelpSteer 3": [
        {
            "domain": "general",
            "language": "english",
            "context": [USER],
            "response1": GOOD,
            "response2": BAD,
            "overall_preference": -3,
            "individual_preference": [{"score": -3, "reasoning": "r", "feedback1": "f", "feedback2": "f"}],
        }
    ],
    "PKU-SafeRLHF": [
        {
            "prompt": QUESTION,
            "response_0": BAD,
            "response_1": GOOD,
            "is_response_0_safe": True,
            "is_response_1_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        }
    ],
    "Nectar": [
        {
            "prompt": f"\n\nHuman: {QUESTION}\n\nAssistant: ",
            "answers": [
                {"answer": "A river.", "model": "a", "rank": 2.0},
                {"answer": BAD, "model": "b", "rank": 3.0},
                {"answer": GOOD, "model": "c", "rank": 1.0},
            ],
            "turns": 1,
            "num_responses": 3,
        }
    ],
    "KTO": [
        {"prompt": QUESTION, "completion": BAD, "label": False},
        {"prompt": QUESTION, "completion": GOOD, "label": True},
    ],
    "rated answers": [
        {"prompt": QUESTION, "completion": BAD, "score": 1},
        {"prompt": QUESTION, "completion": GOOD, "score": 3.5},
    ],
    "ShareGPT (pairs)": [
        {
            "conversations": [SAID],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        }
    ],
    "the paper's comparisons": [
        {
            "prompt": "Consider …",
            "text_correct": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
            "text_incorrect": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
        }
    ],
}
"""Each gives the one pair of GOOD over BAD."""

DEMONSTRATIONS: dict[str, list[dict[str, Any]]] = {
    "prompt, completion": [{"prompt": QUESTION, "completion": GOOD}],
    "messages": [{"messages": [USER, CHOSEN]}],
    "Alpaca": [{"instruction": QUESTION, "input": "", "output": GOOD}],
    "ShareGPT": [{"conversations": [SAID, {"from": "gpt", "value": GOOD}]}],
    "Capybara": [{"source": "Airoboros", "conversation": [{"input": QUESTION, "output": GOOD}]}],
}
"""Each gives the one demonstration of GOOD."""

PROMPTS: dict[str, list[dict[str, Any]]] = {"prompts": [{"question": QUESTION}]}
EVERY = {**PAIRS, **DEMONSTRATIONS, **PROMPTS}
