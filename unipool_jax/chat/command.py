"""`unipool chat` and `unipool answers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from scipy.stats import binomtest

from unipool_jax.chat.answering import Answerer
from unipool_jax.chat.requests import AnswersRequest, ChatRequest
from unipool_jax.config.files import write_atomically
from unipool_jax.config.schema import ConfigError
from unipool_jax.data.conversations import RESPONDS, read_examples
from unipool_jax.data.inputs import find_inputs
from unipool_jax.data.templates import Message, load_template
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.tasks_command import open_model


def _check_room(model: LanguageModel, max_tokens: int) -> None:
    """Raises ConfigError where answers leave no position for a prompt."""
    if max_tokens >= model.max_length:
        raise ConfigError(
            [
                f"max_tokens={max_tokens}: the model reads {model.max_length} positions (data.sequence_length), and a "
                f"prompt needs at least one of them; set max_tokens to {model.max_length - 1} or less"
            ]
        )


def answers_command(request: AnswersRequest) -> int:
    """Answer the questions, print the share that is exactly right and, last, one line of JSON.

    An answer is right where its tokens are those of the response, its end included: nothing is trimmed. A question that
    leaves no room for an answer is not answered, and counts as wrong.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    model, title = open_model(EvalRequest(request.run, step=request.step))
    files = find_inputs(request.files).files
    examples = read_examples(files, model.config.data.template, model.tokenizer)[: request.limit]
    longest = max(len(example.response) for example in examples)
    max_tokens = request.max_tokens or min(longest, model.max_length - 1)
    _check_room(model, max_tokens)
    answerer = Answerer(model, max_tokens, request.temperature, request.top_p, request.seed)
    answers = answerer.answers([example.prompt for example in examples])
    right = [
        answer is not None and answer.tolist() == example.response.tolist()
        for answer, example in zip(answers, examples, strict=True)
    ]
    count, unread = sum(right), sum(answer is None for answer in answers)
    interval = binomtest(count, len(right)).proportion_ci(method="wilson")
    print(title)
    print(f"exactly right: {count} of {len(right)}, {count / len(right):.3f} ({interval.low:.3f}-{interval.high:.3f})")
    if unread:
        print(f"not answered, as the prompt leaves no room for {max_tokens} tokens: {unread}")
    if request.out is not None:
        lines = [
            {
                "place": example.exchange.place,
                "messages": example.exchange.messages,
                "response": example.exchange.response,
                "answer": None if answer is None else model.tokenizer.decode(answer[answer != model.tokenizer.eod]),
                "right": hit,
            }
            for example, answer, hit in zip(examples, answers, right, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(Path(request.out), text.encode())
    result = {"exact_match": count / len(right), "low": interval.low, "high": interval.high}
    print(json.dumps({**result, "questions": len(right), "not_answered": unread}))
    return 0


def chat_command(request: ChatRequest, read: Callable[[str], str] = input) -> int:
    """Talk until an empty line or the end of the input; raises as `answers_command`."""
    model, title = open_model(EvalRequest(request.run, step=request.step))
    _check_room(model, request.max_tokens)
    render = load_template(model.config.data.template)
    answerer = Answerer(model, request.max_tokens, request.temperature, request.top_p, request.seed)
    beginning: list[Message] = [] if request.system is None else [{"role": "system", "content": request.system}]
    messages = list(beginning)
    print(title)
    while True:
        try:
            said = read("> ")
        except EOFError:
            print()
            return 0
        if not said:
            return 0
        if said == "/new":
            messages = list(beginning)
            continue
        asked = [*messages, {"role": "user", "content": said}]
        prompt = model.tokenizer.encode_batch([render(asked)])[0]
        answer = answerer.answers([prompt])[0]
        if answer is None:
            print(f"[this makes {len(prompt)} tokens, and there is room for {answerer.room}; /new begins anew]")
            continue
        text = model.tokenizer.decode_after(prompt, answer[answer != model.tokenizer.eod])
        print(text)
        messages = [*asked, {"role": RESPONDS, "content": text}]
