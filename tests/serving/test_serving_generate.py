"""The official client against the real server; transformers is the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving_live import NAME, Live, live_server
from transformers import AutoTokenizer

import moe_prism

PROMPT = "the old captain said"
EXACT = {"ignore_eos": True, "vllm_xargs": {"k_active": 7}}


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return moe_prism.load_elastic(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return AutoTokenizer.from_pretrained(checkpoint)


def greedy(model, tokenizer, prompt: str, count: int, k_active: int) -> list[int]:
    """What transformers writes at that budget, end tokens ignored."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad(), moe_prism.budget(model, k_active):
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("k_active", [3, 16])
def test_a_completion_is_what_transformers_writes_at_that_budget(k_active: int, server: Live, model, tokenizer) -> None:
    expected = greedy(model, tokenizer, PROMPT, 12, k_active)
    reply = server.client().completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"k_active": k_active}},
    )  # fmt: skip
    assert reply.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(tokenizer.encode(PROMPT)), 12)
    assert reply.usage.mean_k_active == k_active


def test_tokens_may_be_given_instead_of_text(server: Live, tokenizer) -> None:
    ask = {"model": NAME, "max_tokens": 5, "temperature": 0}
    one, two, three = (
        server.client().completions.create(prompt=prompt, **ask)
        for prompt in (PROMPT, tokenizer.encode(PROMPT), [PROMPT, tokenizer.encode(PROMPT)])
    )
    assert one.choices[0].text == two.choices[0].text
    assert [c.text for c in three.choices] == [one.choices[0].text] * 2
    assert [c.index for c in three.choices] == [0, 1]
    assert three.usage.prompt_tokens == 2 * one.usage.prompt_tokens


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_the_same_as_a_whole_reply(chat: bool, server: Live) -> None:
    client = server.client()
    ask = {"model": NAME, "max_tokens": 20, "temperature": 0.7, "seed": 5, "n": 2, "extra_body": EXACT}
    if chat:
        ask["messages"] = [{"role": "system", "content": "the sea"}, {"role": "user", "content": PROMPT}]
        create = client.chat.completions.create
    else:
        ask["prompt"], create = PROMPT, client.completions.create
    whole = create(**ask)
    chunks = list(create(**ask, stream=True, stream_options={"include_usage": True}))
    said = [(c.message.content if chat else c.text) for c in whole.choices]
    streamed, reasons, budgets = ["", ""], [[], []], []
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            streamed[choice.index] += (choice.delta.content if chat else choice.text) or ""
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
            budgets += [choice.k_active] if hasattr(choice, "k_active") else []
    assert streamed == said
    assert said[0] != said[1], "two choices drew the same tokens"
    assert reasons == [["length"], ["length"]]
    assert set(budgets) == {7}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_seed_decides(server: Live) -> None:
    def text(seed: int) -> str:
        reply = server.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=20, temperature=1, seed=seed, extra_body=EXACT
        )
        return reply.choices[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_a_stop_text_ends_the_output_and_the_generation(server: Live) -> None:
    client = server.client()
    ask = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "extra_body": EXACT}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[10:13]
    reply = client.completions.create(**ask, stop=["never there", stop])
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 200
    chunks = client.completions.create(**ask, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]


def test_an_end_token_ends_the_output_and_is_not_part_of_its_text(server: Live, checkpoint: Path, tokenizer) -> None:
    ask = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "temperature": 2, "seed": 3}
    reply = server.client().completions.create(**ask, logprobs=0)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs.tokens[-1] == "</s>"
    assert reply.choices[0].text == "".join(reply.choices[0].logprobs.tokens[:-1]).replace("<s>", "").replace(
        "<pad>", ""
    )
    on = server.client().completions.create(**ask, extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == 200


def test_log_probabilities_are_the_models(server: Live, model, tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    with torch.no_grad(), moe_prism.budget(model, 7):
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
    client = server.client()
    ask = {"model": NAME, "temperature": 0, "max_tokens": 2, "extra_body": EXACT}
    found = client.completions.create(prompt=PROMPT, logprobs=3, **ask).choices[0].logprobs
    top = expected.topk(3)
    assert found.token_logprobs[0] == pytest.approx(top.values[0].item(), abs=1e-4)
    names = [tokenizer.decode([i]) for i in top.indices.tolist()]
    assert found.top_logprobs[0] == pytest.approx(dict(zip(names, top.values.tolist(), strict=True)), abs=1e-4)
    assert found.text_offset == [0, len(found.tokens[0])]
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=2, **ask
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 2
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2]
    assert entries[0].logprob == entries[0].top_logprobs[0].logprob
    assert bytes(entries[0].bytes).decode() == entries[0].token


def test_a_failed_step_answers_its_requests_and_the_engine_goes_on(checkpoint: Path) -> None:
    fail = {"left": 0}

    def faulty(engine) -> None:
        run = engine._runner.forward

        def forward(*args, **kwargs):
            if fail["left"]:
                fail["left"] -= 1
                raise RuntimeError("the memory is on fire")
            return run(*args, **kwargs)

        engine._runner.forward = forward

    with live_server(checkpoint, change=faulty) as live:
        client = live.client()
        ask = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        fail["left"] = 1
        with pytest.raises(Exception, match="on fire") as failed:
            client.completions.create(**ask)
        assert failed.value.status_code == 500
        fail["left"] = 1
        with pytest.raises(Exception, match="on fire") as failed:  # before the first token: a status, not a stream
            client.completions.create(**ask, stream=True)
        assert failed.value.status_code == 500
        stream = client.completions.create(**ask, stream=True)
        next(stream)
        fail["left"] = 1
        with pytest.raises(Exception, match="on fire"):
            list(stream)
        assert client.completions.create(**ask).usage.completion_tokens == 40
        assert live.engine.stats.running == 0


def test_a_request_that_fails_alone_does_not_touch_the_others(checkpoint: Path) -> None:
    """Logits of one of two requests in a batch become NaN; the other one says what it says alone."""
    poison = {"on": False}

    def faulty(engine) -> None:
        run = engine._runner.forward

        def forward(*args, **kwargs):
            logits = run(*args, **kwargs)
            if poison["on"] and len(logits) == 2:
                poison["on"] = False
                logits = logits.clone()
                logits[1] = float("nan")
            return logits

        engine._runner.forward = forward

    with live_server(checkpoint, change=faulty) as live:
        client = live.client()
        ask = {"model": NAME, "prompt": PROMPT, "max_tokens": 150, "temperature": 0, "extra_body": EXACT}
        alone = client.completions.create(**ask).choices[0].text
        stream = client.completions.create(**ask, stream=True)
        said = next(stream).choices[0].text
        poison["on"] = True
        with pytest.raises(Exception, match="not finite") as failed:
            client.completions.create(**ask)
        assert failed.value.status_code == 500
        assert said + "".join(chunk.choices[0].text for chunk in stream) == alone


def test_an_unforeseen_exception_has_the_same_shape(checkpoint: Path) -> None:
    def faulty(engine) -> None:
        engine.check = lambda generation: 1 // 0

    with live_server(checkpoint, change=faulty) as live:
        with pytest.raises(Exception, match="its log has the reason") as failed:
            live.client().completions.create(model=NAME, prompt=PROMPT)
        assert failed.value.status_code == 500
        assert failed.value.type == "server_error"
