"""The server's HTTP: a request is answered, or refused in OpenAI's form, and ends nothing else."""

import contextlib
import json
import logging
import os
import select
import socket
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mlx_lm.server
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)

from ..checkpoint.source import fetch_config
from ..errors import KSAError, RequestError, one_line
from .answer import Answer, text_logprobs
from .replies import HungUp, Replies
from .requests import Wanted, parse

LARGEST_BODY = 64 << 20

# Seconds without a word after which a stream gets a comment.
SILENCE = 1.5

CHAT = {"/v1/chat/completions": True, "/chat/completions": True, "/v1/completions": False}


class Handler(mlx_lm.server.APIHandler):
    """mlx-lm's handler with a way of its own from the body to the answer.

    mlx-lm hands most fields on unchecked, answers every fault with 404, and generates on for a
    client that left before its answer was whole (mlx-lm#677).
    """

    response_generator: Any  # server.ResponseGenerator, which stands above
    timeout = 300  # seconds that a client may be silent for while it sends
    began = False  # whether the status line of an answer is out
    spoke = 0.0  # when a stream's client heard last

    def do_POST(self):
        try:
            self._post()
        except RequestError as e:
            self._fail(e.status, "invalid_request_error", str(e), e.param, e.code)
        except (ConnectionError, TimeoutError) as e:
            logging.info("The client hung up (%s)", type(e).__name__)
        except Exception as e:
            logging.exception("A request failed")
            self._fail(500, "server_error", f"{type(e).__name__}: {one_line(e)}")

    def do_GET(self):
        path = self.path.partition("?")[0].rstrip("/")
        with contextlib.suppress(ConnectionError, TimeoutError):
            if path == "/health":
                self.handle_health_check()
            elif path == "/v1/models" or path.startswith("/v1/models/"):
                self.handle_models_request()
            else:
                self._fail(404, "invalid_request_error", f"{path}: there is no such page")

    def _fail(self, status, kind, message, param=None, code=None):
        error = {"message": message, "type": kind, "param": param, "code": code}
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self.began:
                self._event({"error": error})
            else:
                self._reply({"error": error}, status)

    def _reply(self, body: dict[str, Any], status: int = 200):
        data = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _event(self, body: dict[str, Any] | str):
        data = body if isinstance(body, str) else json.dumps(body)
        self._say(f"data: {data}")

    def _say(self, line: str):
        """A line of a stream, after its head if it is the first."""
        if not self.began:
            self._set_stream_headers(200)
            self.end_headers()
            self.began = True
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()
        self.spoke = time.monotonic()

    # A request

    def _post(self):
        path = self.path.partition("?")[0].rstrip("/")
        raw = self._body()
        if path not in CHAT:
            raise RequestError(None, f"{path}: there is no such page", status=404)
        wanted = parse(raw, CHAT[path], self.response_generator.cli_args)
        self.stream, self.requested_model = wanted.stream, wanted.model
        kind = "chatcmpl" if wanted.chat else "cmpl"
        self.request_id = f"{kind}-{uuid.uuid4()}"
        self.spoke = time.monotonic()
        if wanted.chat:
            self.object_type = "chat.completion.chunk" if wanted.stream else "chat.completion"
            mlx_lm.server._inline_image_urls(wanted.messages)
        else:
            self.object_type = "text_completion"
        # All choices are handed in at once, so that they share the batch.
        model, sent = self._model(wanted), []
        try:
            for n, prompt in enumerate(
                p for p in wanted.prompts for _ in range(wanted.numbers["n"])
            ):
                args = _arguments(wanted, model, n)
                text: Any = "" if prompt is None else prompt  # or ids, which `_tokenize` takes
                request = CompletionRequest(
                    "chat" if wanted.chat else "text",
                    text,
                    wanted.messages,
                    wanted.tools,
                    wanted.role_mapping,
                )
                replies = self.response_generator.submit(request, args, self._hung_up)
                sent.append((replies, args, request.tools))
            self._answer(sent, wanted)
        finally:
            for replies, _, _ in sent:
                replies.abandon()

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise RequestError(None, "the Content-Length header is missing", status=411)
        if not (length.isdecimal() and length.isascii() and len(length) < 19):
            raise RequestError(None, f"Content-Length: found {length[:20]!r}, expected a length")
        if int(length) > LARGEST_BODY:
            raise RequestError(
                None, f"the body is larger than {LARGEST_BODY >> 20} MiB", status=413
            )
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise HungUp
        return raw

    def _model(self, wanted: Wanted) -> ModelDescription:
        """The model that is asked for, under the one name that mlx-lm loads it once by."""
        flags, name = self.response_generator.cli_args, wanted.model
        if wanted.adapters is not None and not os.path.isdir(wanted.adapters):
            raise RequestError("adapters", f"{wanted.adapters}: no such folder")
        own = flags.model and (name == flags.model or name == _id(flags.model))
        if name == "default_model" or own:
            if not flags.model:
                raise RequestError("model", "found none, and the server has none of its own")
            name = "default_model"
        else:
            try:
                fetch_config(name)
            except (KSAError, OSError, ValueError) as e:
                raise RequestError("model", one_line(e), "model_not_found", 404) from None
        adapter: Any = wanted.adapters  # mlx-lm says str, and takes None
        return ModelDescription(name, "default_model", adapter)

    def _hung_up(self) -> bool:
        """Whether the client has closed its end, and waits for no answer."""
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # Its answer

    def _answer(self, sent: list[Any], wanted: Wanted):
        prompt_tokens, cached, tokens, choices, prompts = 0, 0, 0, [], set()
        for index, (replies, args, tools) in enumerate(sent):
            ctx = replies.context(partial(self._sign, replies))
            answer = Answer(ctx, args, tools, self.stream)
            for news in self._pieces(replies, answer):
                self._event(self._choice(news, index, None, wanted))
            choices.append(self._choice(answer, index, answer.why or "stop", wanted))
            if self.stream:
                self._event(choices[-1])
            # As at OpenAI, n choices of one prompt have read it once.
            if (which := index // wanted.numbers["n"]) not in prompts:
                prompts.add(which)
                prompt_tokens += len(ctx.prompt)
                cached += max(ctx.prompt_cache_count, 0)
            tokens += answer.tokens
            replies.abandon()
        usage = self.completion_usage_response(prompt_tokens, tokens, cached)
        if not self.stream:
            whole = choices[0]
            whole["choices"] = [c["choices"][0] for c in choices]
            self._reply({**whole, "usage": usage["usage"]})
            return
        if wanted.include_usage:
            self._event({**usage, "object": self.object_type})
        self._event("[DONE]")

    def _pieces(self, replies: Replies, answer: Answer) -> Iterator[Answer]:
        """The answer whenever there is something new to stream."""
        for gen in replies.tokens(partial(self._sign, replies)):
            answer.add(gen)
            if answer.why:
                return
            if self.stream and answer.has_news:
                yield answer
                answer.clear()

    def _sign(self, replies: Replies):
        """A comment in a stream that was silent: clients, and what is between, give up."""
        if self.stream and time.monotonic() - self.spoke > SILENCE:
            self._say(f": {replies.state}")

    def _choice(self, answer: Answer, index: int, why: Any, wanted: Wanted) -> dict[str, Any]:
        """mlx-lm's packet, of one choice."""
        packet = self.generate_response(
            answer.text,
            why,
            0,
            0,
            tool_calls=answer.format_calls(answer.calls),
            reasoning_text=answer.reasoning,
        )
        packet.pop("usage", None)
        choice = packet["choices"][0]
        choice["index"] = index
        if wanted.logprobs and wanted.chat:
            choice["logprobs"] = {"content": answer.logprobs}
        elif wanted.logprobs:
            top, before = wanted.numbers["top_logprobs"], answer.letters
            choice["logprobs"] = text_logprobs(answer.logprobs, top, before)
            answer.letters += sum(len(e["token"]) for e in answer.logprobs)
        return packet

    # Models

    def handle_models_request(self):
        """The served model, and those in the Hub's cache that mlx-lm could load."""
        served = self.response_generator.cli_args.model
        name = unquote(self.path.partition("?")[0])[len("/v1/models/") :]
        names = [_id(served)] if served else []
        names += [n for n in sorted(_cached()) if n not in names]
        models = [{"id": n, "object": "model", "created": self.created, "owned_by": "local"}
                  for n in names]  # fmt: skip
        if not name:
            self._reply({"object": "list", "data": models})
        elif name in names:
            self._reply(models[names.index(name)])
        else:
            self._fail(404, "invalid_request_error", f"{name}: no such model", "model",
                       "model_not_found")  # fmt: skip


def _id(model: str) -> str:
    """The name of the served model among those that /v1/models lists."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _cached() -> list[str]:
    """Repos in the Hub's cache with an MLX or Hugging Face model (mlx-lm#632: it may not exist)."""
    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repo in repos:
        files = {f.file_name for r in repo.revisions for f in r.files}
        weights = any(f.endswith(".safetensors") for f in files)
        if repo.repo_type == "model" and weights and {"config.json"} < files:
            found.append(repo.repo_id)
    return found


def _arguments(wanted: Wanted, model: ModelDescription, n: int) -> GenerationArguments:
    """mlx-lm's, for the choice n: with a seed each choice has its own."""
    take = wanted.numbers
    return GenerationArguments(
        model=model,
        sampling=SamplingArguments(
            **{name: take[name] for name in SamplingArguments.__dataclass_fields__}
        ),
        logits=LogitsProcessorArguments(
            logit_bias=wanted.logit_bias,
            **{
                name: take[name]
                for name in LogitsProcessorArguments.__dataclass_fields__
                if name != "logit_bias"
            },
        ),
        stop_words=wanted.stop,
        max_tokens=take["max_tokens"],
        num_draft_tokens=take["num_draft_tokens"],
        logprobs=wanted.logprobs,
        top_logprobs=take["top_logprobs"],
        seed=None if wanted.seed is None else (wanted.seed + n) % 2**64,
        chat_template_kwargs=wanted.chat_template_kwargs,
    )
