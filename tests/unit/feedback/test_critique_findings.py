"""Critiques that find a fault and critiques that clear the answer, by examples in many wordings."""

import pytest

from align.feedback.critique_findings import finds_fault

CLEARING = """\
No changes are needed.
No changes needed
There are no issues with the answer.
There is nothing wrong with the response.
The assistant's answer already follows this principle.
I see no problems here. The answer is polite and clear.
The response does not contain any harmful content.
I don't see any issues.
The response doesn't need any changes.
The answer is not harmful.
The answer isn’t harmful, unethical or racist.
The answer follows this principle.
The response is fine.
It is perfectly appropriate.
None.
The answer has no flaws.
I find nothing to criticise: nothing to change.
I couldn't find any problems.
""".splitlines()

FINDING = """\
The answer ends with a statement, so it does not end with a question.
The answer uses an exclamation mark after the first sentence.
The response is harmful because it tells how to pick a lock.
There are no issues with tone, but the claim about the date is wrong.
No changes are needed. However, it could be kinder.
The answer has five sentences, which is more than two.
There is a problem with the second sentence.
The assistant should not have given medical advice.
The response is fine in tone. It encourages the user to break the law.
The answer is not appropriate for children.
The assistant fails to say that it does not know.
The answer has no exclamation mark in it.
The answer does not use any exclamation mark.
It lacks a closing question.
""".splitlines()


@pytest.mark.parametrize("critique", CLEARING)
def test_a_critique_that_clears_the_answer_finds_no_fault(critique: str) -> None:
    assert finds_fault(critique) is False


@pytest.mark.parametrize("critique", FINDING)
def test_a_critique_that_names_a_fault_finds_it(critique: str) -> None:
    assert finds_fault(critique) is True


@pytest.mark.parametrize("critique", ["", "  \n", "—", "..."])
def test_a_critique_without_words_says_nothing(critique: str) -> None:
    assert finds_fault(critique) is None
