"""Log-probabilities in the shapes of both routes."""

import pytest

from lserve_jax import LLM
from lserve_jax.serve.logprobs import LEAST, TokenTexts, of_chat, of_completion, of_prompt


class Texts(TokenTexts):
    """Texts by token; 7 and 8 have the same."""

    def __init__(self) -> None:
        super().__init__(None)
        self._found = {1: "a", 2: "bc", 7: "\ufffd", 8: "\ufffd", 9: "é"}


def test_a_completion_has_the_token_itself_beside_the_likeliest():
    found = of_completion(Texts(), [1, 2], [-1.0, -2.0], [((9, -0.5), (1, -1.0)), ((9, -0.1), (1, -3.0))], 1, offset=4)
    assert found == {
        "tokens": ["a", "bc"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0, "é": -0.5}, {"bc": -2.0, "é": -0.1}],
        "text_offset": [4, 5],
    }


def test_of_two_tokens_with_one_text_the_likelier_counts_as_lm_eval_needs_it():
    """lm-eval calls a token greedy if its value is the largest of the dictionary."""
    for token, others in ((7, ((8, -0.5),)), (8, ((7, -0.5),))):
        found = of_completion(Texts(), [token], [-3.0], [others], 1)
        assert found["token_logprobs"][0] != max(found["top_logprobs"][0].values())
    greedy = of_completion(Texts(), [7], [-0.5], [((7, -0.5), (8, -3.0))], 2)
    assert greedy["token_logprobs"][0] == max(greedy["top_logprobs"][0].values())


def test_the_first_token_of_a_prompt_has_no_value():
    found = of_completion(Texts(), [1, 2], [None, -1.0], [None, ((2, -1.0),)], 1)
    assert found["token_logprobs"] == [None, -1.0]
    assert found["top_logprobs"] == [None, {"bc": -1.0}]


def test_none_of_the_likeliest_leaves_the_token_itself():
    assert of_completion(Texts(), [1], [-1.0], [], 0)["top_logprobs"] == [{"a": -1.0}]


def test_a_chat_has_bytes_where_a_token_is_text_of_its_own():
    found = of_chat(Texts(), [9, 7], [-1.0, float("-inf")], [((9, -1.0), (1, -2.0)), ((1, -0.1), (2, -0.2))], 1)
    (first, second) = found["content"]
    assert first["bytes"] == [0xC3, 0xA9] and first["top_logprobs"] == [
        {"token": "é", "logprob": -1.0, "bytes": [0xC3, 0xA9]}
    ]
    assert second["bytes"] is None and second["logprob"] == LEAST


def test_a_prompt_has_ranks_as_far_as_they_are_known():
    found = of_prompt(Texts(), [1, 2, 9], [None, -1.0, -3.0], [None, ((2, -1.0),), ((1, -0.2),)], 1)
    assert found == [
        None,
        {"2": {"logprob": -1.0, "rank": 1, "decoded_token": "bc"}},
        {
            "1": {"logprob": -0.2, "rank": 1, "decoded_token": "a"},
            "9": {"logprob": -3.0, "rank": None, "decoded_token": "é"},
        },
    ]


def test_the_texts_of_tokens_make_up_the_text(llm: LLM):
    assert llm.tokenizer is not None
    texts, text = TokenTexts(llm.tokenizer), "hello  world, the end\n"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert "".join(texts[token] for token in ids) == llm.tokenizer.decode(ids)
    assert texts[llm.tokenizer.eos_token_ids[0]] == "</s>"


def test_a_sentencepiece_token_keeps_its_space():
    from lserve_jax.text.tokenizer import Tokenizer
    from tests.lserve_jax.serve.running import MODEL

    tokenizer = Tokenizer.from_folder(MODEL.replace("llama3", "llama2"))
    ids = tokenizer.encode("a b", add_special_tokens=False)
    texts = TokenTexts(tokenizer)
    assert "".join(texts[token] for token in ids).endswith(" b")


def test_without_a_tokenizer_tokens_have_numbers():
    assert TokenTexts(None)[5] == "token_id:5"


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_generated_is_nothing(count: int):
    assert of_chat(Texts(), [], [], [], count) == {"content": [], "refusal": None}
    assert of_completion(Texts(), [], [], [], count)["tokens"] == []
