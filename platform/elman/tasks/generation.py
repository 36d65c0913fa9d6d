"""From a prompt to a continuation, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from elman.config.schema import GenerationConfig
from elman.errors import DataError
from elman.models.language_model import LanguageModel
from elman.models.sampling import beam_search, generate_chunks
from elman.text.tokenizer import StreamDecoder, Tokenizer

OnUnknown = Literal["refuse", "skip"]


class _Stopper:
    """Holds back text that may be the beginning of the stop text, and ends before it."""

    def __init__(self, decoder: StreamDecoder, stop: str | None) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.ended = False

    def feed(self, tokens: Iterable[int]) -> str:
        return "" if self.ended else self._release("".join(map(self._decoder.feed, tokens)), final=False)

    def flush(self) -> str:
        return "" if self.ended else self._release(self._decoder.flush(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        self._held += piece
        if self._stop is None or final:
            before, found, _ = self._held.partition(self._stop) if self._stop else (self._held, "", "")
            self._held, self.ended = "", bool(found)
            return before
        before, found, _ = self._held.partition(self._stop)
        if found:
            self.ended = True
            return before
        overlap = next(
            (n for n in range(min(len(self._stop) - 1, len(self._held)), 0, -1)
             if self._held.endswith(self._stop[:n])), 0,
        )  # fmt: skip
        safe = len(self._held) - overlap
        released, self._held = self._held[:safe], self._held[safe:]
        return released


class TextGenerator:
    """A model and the tokenizer it was trained with.

    Args:
        model: In any mode, on any device.
        tokenizer: Its vocabulary is the model's.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        # <unk> stands for words that are not there to be written.
        self._forbidden = [] if tokenizer.unknown_id is None else [tokenizer.unknown_id]

    def encode(self, prompt: str, on_unknown: OnUnknown = "refuse") -> list[int]:
        """The prompt's token ids.

        Raises:
            DataError: The vocabulary lacks symbols of the prompt, and they are not to be skipped.
        """
        unknown = self.tokenizer.unknown_symbols(prompt)
        if unknown and on_unknown == "refuse":
            shown = " ".join(repr(symbol) for symbol in unknown[:10]) + (" …" if len(unknown) > 10 else "")
            kind = "words" if self.tokenizer.level == "word" else "characters"
            raise DataError(
                f"The prompt has {kind} that the model never saw: {shown}. Leave them out, or use --on-unknown skip."
            )
        ids = self.tokenizer.encode(prompt)
        return [i for i in ids if i != self.tokenizer.unknown_id] if unknown else ids

    def stream(self, prompt: str, config: GenerationConfig, on_unknown: OnUnknown = "refuse") -> Iterator[list[str]]:
        """Yield what each sample gained, as it is produced; the prompt is not repeated.

        Raises:
            DataError: See encode.
        """
        ids = self.encode(prompt, on_unknown)
        stoppers = [self._stopper(ids, config) for _ in range(config.samples)]
        for ids_TB in generate_chunks(self.model, ids, config, forbidden=self._forbidden):
            yield [stopper.feed(tokens) for stopper, tokens in zip(stoppers, ids_TB.t().tolist(), strict=True)]
            if all(stopper.ended for stopper in stoppers):
                break
        yield [stopper.flush() for stopper in stoppers]

    def _stopper(self, prompt_ids: list[int], config: GenerationConfig) -> _Stopper:
        decoder = self.tokenizer.decoder()
        for token in prompt_ids:  # the text goes on: a word after a word begins with its space
            decoder.feed(token)
        return _Stopper(decoder, config.stop)

    def complete(self, prompt: str, config: GenerationConfig, on_unknown: OnUnknown = "refuse") -> list[str]:
        """Every sample whole, without the prompt."""
        if config.beams > 1:
            return [text for text, _ in self.beams(prompt, config, on_unknown)]
        samples = [""] * config.samples
        for pieces in self.stream(prompt, config, on_unknown):
            samples = [whole + piece for whole, piece in zip(samples, pieces, strict=True)]
        return samples

    def beams(
        self, prompt: str, config: GenerationConfig, on_unknown: OnUnknown = "refuse"
    ) -> list[tuple[str, float]]:
        """The likeliest continuations, best first, each with its log-probability in nats."""
        found = []
        ids = self.encode(prompt, on_unknown)
        for hypothesis in beam_search(self.model, ids, config, forbidden=self._forbidden):
            stopper = self._stopper(ids, config)
            text = stopper.feed(hypothesis.ids) + stopper.flush()
            found.append((text, hypothesis.log_probability))
        return found
