"""mlx_lm.server, of which no request can end the service: python -m ksa_mlx server --model FOLDER

The flags are mlx_lm.server's and a few more (`flags.py`); templates, tools and sampling are its
own. What is ours, as of mlx-lm 0.32: the caches of a batch, plain or quantised (`batching.py`); the
prompt cache (`prompt_cache.py`), in files too (`disk.py`); every field of a request is checked and
every fault answered (`requests.py`, `handler.py`); a client that leaves stops its generation
(`replies.py`); and here a start that cannot serve ends, what does not fit in memory is refused, a
fault does not end the generation thread, and the end is quiet. The stock command serves a KSA model
as well (`mlx_lm.server --model FOLDER
--trust-remote-code`), without all this.
"""

import dataclasses
import functools
import logging
import os
import signal
import socket
import sys
import weakref
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import mlx_lm.server

from ..config import ModelArgs
from ..errors import KSAError, MemoryLimitError, RequestError, one_line
from ..memory.caches import Quantised
from ..memory.room import Room
from ..model import Model
from . import batching, flags
from .disk import Disk
from .handler import Handler
from .identity import Identities
from .ids import table_of
from .prompt_cache import PromptCache
from .prompt_lookup import PromptLookup
from .replies import Replies
from .requests import check_against

# Bytes of all prompt caches in files, where no flag says another size.
DISK_SIZE = 20 * 10**9

# An answer without a limit, for a model without a context.
ENDLESS = 1 << 20


class ModelProvider(mlx_lm.server.ModelProvider):
    """mlx-lm's, whose KSA models make the caches that the flags ask for."""

    def _load(self, *args, **kwargs):
        super()._load(*args, **kwargs)
        if isinstance(self.model, Model):
            self.model.text_bits = self.cli_args.kv_text_bits
            self.model.value_bits = self.cli_args.kv_value_bits
        if self.cli_args.prompt_lookup is not None:
            stand_in: Any = PromptLookup()
            self.draft_model, self.is_batchable = stand_in, False

    def has(self, wanted: Any) -> bool:
        """Whether that `ModelDescription` is of the model that is loaded."""
        return self.model_key == (
            self._model_map.get(wanted.model, wanted.model),
            self._adapter_map.get(wanted.model, wanted.adapter),
            self._draft_model_map.get(wanted.draft, wanted.draft),
        )


class ResponseGenerator(mlx_lm.server.ResponseGenerator):
    """mlx-lm's generation thread, which outlives what goes wrong in it (mlx-lm#1505, #1909)."""

    prompt_cache: PromptCache

    def __init__(self, *args: Any, **kwargs: Any):
        self.started = Event()
        self.start_error: Exception | None = None
        self._in_flight: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._measured: tuple[Any, Any] = (None, None)
        self._room: Room | None = None
        # mlx-lm hands its flags of the KV cache to single requests only.
        mlx_lm.server.BatchGenerator = functools.partial(  # type: ignore[misc,assignment]
            batching.BatchGenerator, quantize=batching.wanted(args[0].cli_args)
        )
        super().__init__(*args, **kwargs)  # which starts the thread

    def submit(self, request: Any, args: Any, hung_up: Callable[[], bool]) -> Replies:
        """Hand a request in. Its answer comes through what is returned."""
        if not self.generation_available():
            raise RuntimeError("generation thread died")
        replies = Replies(hung_up, self.generation_available)
        self.requests.put((replies, request, args))
        return replies

    def _run_generate(self):
        try:
            self.model_provider.load_default()
            if self.model_provider.model is not None:
                self.prompt_cache.begin(self.model_provider.model_key)
        except Exception as e:
            self.start_error, self._generation_failed = e, True
            return
        finally:
            self.started.set()
        while True:
            try:
                return self._generate()
            except Exception as e:
                logging.exception("A fault in the generation thread")
                if self._is_distributed:  # the other machines are still in the middle of it
                    self._generation_failed = True
                    return None
                for replies in list(self._in_flight):
                    replies.put(RuntimeError(one_line(e)))
            mx.clear_cache()

    def _next_request(self, *args, **kwargs):
        request = super()._next_request(*args, **kwargs)
        if request is not None:
            if not self._is_distributed and getattr(request[0], "gone", False):
                return None
            self._in_flight[request[0]] = request[-1]
        return request

    def _tokenize(self, tokenizer, request, args, *rest, **kwargs):
        """mlx-lm's, also for a prompt of ids, and checked against the model.

        In mlx-lm 0.32 this is the last step whose faults go to the client.
        """
        try:
            if isinstance(request.prompt, list):
                text = dataclasses.replace(request, prompt="")
                _, _, *others = super()._tokenize(tokenizer, text, args, *rest, **kwargs)
                found = (request.prompt, [request.prompt], *others)
            else:
                found = super()._tokenize(tokenizer, request, args, *rest, **kwargs)
        except Exception as e:  # whatever a template or a tokenizer makes of it
            param = "messages" if request.request_type == "chat" else "prompt"
            raise RequestError(param, one_line(e)) from None
        if isinstance(self.model_provider.draft_model, PromptLookup):
            self.model_provider.draft_model.text = list(found[0])
        check_against(found[0], args, *self._measure())
        self._check_room(len(found[0]), args)
        args.piece = lambda token: tokenizer.decode([token])
        args.is_eos = set(tokenizer.eos_token_ids).__contains__
        return found

    def _measure(self) -> tuple[int, int, int | None]:
        """How many ids the model reads, how many it predicts, and its context if it says."""
        model: Any = self.model_provider.model
        if self._measured[0] is not model:
            args = getattr(model, "args", None)
            # The shape is known without computing anything.
            width = model(mx.array([[0]])).shape[-1]
            context = getattr(args, "max_position_embeddings", None)
            ids = table_of(model) or width
            if not isinstance(args, ModelArgs):
                # Some configs give the length before scaling, some the one behind it.
                scaling = getattr(args, "rope_scaling", None) or {}
                context = context and int(context * max(1, scaling.get("factor") or 1))
            self._measured, self._room = (model, (ids, width, context)), None
        return self._measured[1]

    def _check_room(self, prompt: int, args: Any):
        """Refuse what does not fit beside the requests that run; cached prompts make room."""
        if self._is_distributed:  # each machine would have to say the same
            return
        args.length = prompt, min(args.max_tokens, ENDLESS)
        if self._room is None:
            provider, flags = self.model_provider, self.cli_args
            quantised = None
            if flags.kv_bits is not None:
                start = flags.quantized_kv_start
                quantised = Quantised(flags.kv_bits, flags.kv_group_size, start)
            both = provider.model, provider.draft_model
            models = [m for m in both if not isinstance(m, PromptLookup | None)]
            self._room = Room(models, flags.memory_limit, quantised, flags.prefill_step_size)
        running = {
            replies: other.length
            for replies, other in self._in_flight.items()
            if isinstance(replies, Replies)
            and other is not args
            and hasattr(other, "length")
            and not (replies.gone or replies.done)
        }
        reading = 1 + sum(not r.answers for r in running)
        reading = min(reading, self.cli_args.prompt_concurrency)
        try:
            need = self._room.check("prompt", args.length, list(running.values()), reading)
        except MemoryLimitError as e:
            raise RequestError(None, str(e), code="insufficient_memory") from None
        self.prompt_cache.keep_within(self._room.limit - need.total)

    def _is_batchable(self, args):
        """mlx-lm's, but for KSA models also with quantised keys and values."""
        provider = self.model_provider
        if self.cli_args.kv_bits is None:
            return super()._is_batchable(args)
        ours = isinstance(provider.model, Model) and provider.has(args.model)
        return ours and provider.is_batchable and args.seed is None

    def _make_state_machine(self, model_key, tokenizer, stop_words, *args, **kwargs):
        """Stop words are found by their tokens as before, and in the text by `answer.StopText`."""
        words = [w for w in stop_words if tokenizer.encode(w, add_special_tokens=False)]
        stops, _ = super()._make_state_machine(model_key, tokenizer, words, *args, **kwargs)
        _, text = super()._make_state_machine(model_key, tokenizer, [], *args, **kwargs)
        return stops, text

    def _serve_single(self, request, *args, **kwargs):
        """mlx-lm rewinds any number of drafts, and a cache that cannot raises (mlx-lm#1446)."""
        replies, arguments = request[0], request[-1]
        if rollback := getattr(self.model_provider.model, "rollback", 0):
            arguments.num_draft_tokens = min(arguments.num_draft_tokens, rollback)
        if isinstance(replies, Replies):
            replies.alone = True
        if isinstance(self.model_provider.draft_model, PromptLookup):
            self.model_provider.draft_model.progress = lambda *done: replies.put(done)
        return super()._serve_single(request, *args, **kwargs)


class _HTTPServer(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        kind, error, _ = sys.exc_info()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            logging.error("A connection failed (%s: %s)", kind and kind.__name__, error)


def run(
    host: str,
    port: int,
    model_provider: Any,
    server_class: type[ThreadingHTTPServer] = _HTTPServer,
    handler_class: type[Handler] = Handler,
):
    """mlx_lm.server's `run`: raises `KSAError` where it cannot serve, and ends at Ctrl-C or
    SIGTERM, when what the prompt cache holds is on the disk."""
    adapter = model_provider.cli_args.adapter_path
    if adapter is not None and not Path(adapter).is_dir():
        raise KSAError(f"--adapter-path: {adapter}: no such folder")
    first = mx.distributed.init().rank() == 0
    httpd = _bind(host, port, server_class) if first else None
    cache = _prompt_cache(model_provider)
    generator = ResponseGenerator(model_provider, cache)
    try:
        generator.started.wait()
        if generator.start_error is not None:
            generator.join()
            raise generator.start_error
        if httpd is None:
            generator.join()
            return
        fingerprint = mlx_lm.server.get_system_fingerprint()
        httpd.RequestHandlerClass = lambda *args, **kwargs: handler_class(
            generator, *args, system_fingerprint=fingerprint, **kwargs
        )
        httpd.server_activate()
        signal.signal(signal.SIGTERM, _terminate)
        logging.info(f"Serving at http://{host}:{httpd.server_port}/v1")
        httpd.serve_forever()
    except (KeyboardInterrupt, SystemExit) as e:
        status = 128 + (signal.SIGINT if isinstance(e, KeyboardInterrupt) else signal.SIGTERM)
        try:
            generator._stop = True
            generator._generation_thread.join(5)
            cache.close()
        finally:  # also at a second Ctrl-C
            _leave(status)


def _prompt_cache(provider: Any) -> PromptCache:
    """The prompt cache that the flags ask for."""
    args, disk = provider.cli_args, None
    if args.prompt_cache_dir is not None:
        if mx.distributed.init().size() > 1:
            raise KSAError("--prompt-cache-dir: not on several machines, whose files may differ")
        disk = Disk(args.prompt_cache_dir, args.prompt_cache_disk_size or DISK_SIZE)
    most = args.prompt_cache_bytes or 1 << 63
    return PromptCache(args.prompt_cache_size, most, disk, Identities(provider))


def _terminate(*_: Any):
    raise SystemExit


def _bind(host: str, port: int, server_class: type[ThreadingHTTPServer]) -> ThreadingHTTPServer:
    """A server that has its port, and does not listen yet."""
    if not 0 <= port <= 65535:
        raise KSAError(f"--port: found {port}, expected 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        server = type("Server", (server_class,), {"address_family": family})(
            address, Handler, bind_and_activate=False
        )
        server.server_bind()
        return server
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or one_line(e)
        raise KSAError(f"--host {host} --port {port}: cannot serve there ({why})") from None


def _leave(status: int):
    """End the process. Not by way of the interpreter's end, where MLX's threads abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def install():
    """Make mlx_lm.server, in this process, use what is here."""
    ours = {
        "LRUPromptCache": PromptCache,
        "ModelProvider": ModelProvider,
        "ResponseGenerator": ResponseGenerator,
        "APIHandler": Handler,
        "run": run,
        "argparse": flags.ARGPARSE,
    }
    for name, what in ours.items():
        setattr(mlx_lm.server, name, what)
