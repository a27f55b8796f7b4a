"""SentencePiece: learnt in the experiment or loaded, with segmentations sampled in training."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megaseq.base import optional
from megaseq.data.problem import data_error
from megaseq.data.tokenizer.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    Corpus,
    Ids,
    Tokenizer,
    read_file,
)

MODEL_FILE = "sentencepiece.model"
# The library draws from one generator a thread, which all take their seed from one place.
_seed_lock = threading.Lock()


class SentencePiece(Tokenizer):
    """Pieces of words (Kudo and Richardson 2018), by unigram language models (Kudo 2018) or BPE (Sennrich 2016).

    The same corpus and params give the same model, byte for byte.
    """

    class Params(Tokenizer.Params):
        data_dir: str = ""
        """Directory that a relative `model_path` starts from; `--data-dir` fills it where it is empty."""
        model_path: str = ""
        """A model to load; empty learns one from the training input."""
        vocab_size: int = 8000
        """Pieces to learn, the special ones and the tags included."""
        model_type: Literal["unigram", "bpe"] = "unigram"
        """How pieces are chosen."""
        character_coverage: float = 1.0
        """Part of the corpus' characters that become pieces; 0.9995 suits Chinese and Japanese."""
        byte_fallback: bool = False
        """Whether characters without a piece are spelt as bytes instead of unknown."""
        split_digits: bool = False
        """Whether every digit is its own piece."""
        normalization: Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"] = "nmt_nfkc"
        """The library's rule for normalising texts; `_cf` folds case."""
        max_piece_length: int = 16
        """Characters in a piece, at most."""
        hard_vocab_limit: bool = True
        """Whether a corpus too small for `vocab_size` unigram pieces is an error; False learns fewer."""
        learning_threads: int = 4
        """Threads that learn; a fixed number, since sums in another order give other pieces."""
        sampling_alpha: float = 0.0
        """For training only. Unigram: smoothness of the distribution that segmentations are drawn from, smaller is more
        even, 0 is off. BPE: chance to leave out a merge (BPE-dropout, Provilkov et al. 2020)."""
        sampling_nbest_size: int = -1
        """Unigram segmentations to draw from; -1 for all."""

        def validate(self) -> Iterator[Any]:
            yield from super().validate()
            if not 0.0 <= self.sampling_alpha <= 1.0:
                yield f"sampling_alpha: must be from 0 to 1, but is {self.sampling_alpha}. Set it in this range."
            if self.sampling_nbest_size != -1 and self.sampling_nbest_size < 2:
                value = self.sampling_nbest_size
                yield f"sampling_nbest_size: must be -1 or at least 2, but is {value}. Set sampling_alpha 0 for none."
            if self.learning_threads < 1:
                yield f"learning_threads: must be at least 1, but is {self.learning_threads}. Set a positive number."

    params: Params

    def __init__(self, p: Params, *, files: Mapping[str, bytes]) -> None:
        super().__init__(p, files=files)
        library = _library()
        try:
            self._processor = library.SentencePieceProcessor(model_proto=self._file(MODEL_FILE))
        except RuntimeError as error:
            where = p.model_path or MODEL_FILE
            rule = "be a SentencePiece model"
            raise data_error(where, rule, f"not one: {error}", "Check the file") from None
        self._vocab_size = int(self._processor.vocab_size())
        self.unk_id, self.eos_id = int(self._processor.unk_id()), int(self._processor.eos_id())
        self.pad_id = int(self._processor.pad_id())
        # T5 has no piece that begins a text: its decoder starts with padding.
        self.bos_id = int(self._processor.bos_id()) if self._processor.bos_id() >= 0 else self.pad_id
        for name, value in (("pad", self.pad_id), ("eos", self.eos_id)):
            if value < 0:
                remedy = f"Learn the model with {name}_id"
                raise data_error(p.model_path or MODEL_FILE, f"have a {name} piece", "without one", remedy)
        self._tags = {tag: self._reserved(tag) for tag in p.tags}

    def _reserved(self, tag: str) -> int:
        index = int(self._processor.piece_to_id(tag))
        if index == self.unk_id:
            rule = f"have the tag {tag} as a piece"
            where = self.params.model_path or MODEL_FILE
            raise data_error(where, rule, "a model without it", "Learn it with these tags")
        return index

    @classmethod
    def learns(cls, p: Tokenizer.Params) -> bool:
        assert isinstance(p, SentencePiece.Params)  # For the type checker: the params' class is bound to this one.
        return not p.model_path

    @classmethod
    def make_files(cls, p: Tokenizer.Params, *, corpus: Corpus | None) -> dict[str, bytes]:
        """Loads or learns the model; raises DataError if `vocab_size` does not suit the corpus."""
        assert isinstance(p, SentencePiece.Params)  # For the type checker: the params' class is bound to this one.
        if p.model_path:
            return {MODEL_FILE: read_file(p.model_path, data_dir=p.data_dir)}
        assert corpus is not None  # `build` has seen to it.
        model = io.BytesIO()
        try:
            _library().SentencePieceTrainer.train(
                sentence_iterator=corpus.open(),
                model_writer=model,
                vocab_size=p.vocab_size,
                model_type=p.model_type,
                character_coverage=p.character_coverage,
                byte_fallback=p.byte_fallback,
                split_digits=p.split_digits,
                normalization_rule_name=p.normalization,
                max_sentencepiece_length=p.max_piece_length,
                hard_vocab_limit=p.hard_vocab_limit and p.model_type == "unigram",
                num_threads=p.learning_threads,
                user_defined_symbols=list(p.tags),
                pad_id=PAD_ID,
                unk_id=UNK_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].strip().rstrip(".")
            path = p.params_path or "SentencePiece"
            # Only unigram models can have fewer pieces than were asked for.
            fewer = f", or {path}.hard_vocab_limit=False" if p.model_type == "unigram" and p.hard_vocab_limit else ""
            raise data_error(
                f"{path}.vocab_size",
                "suit the corpus",
                f"{p.vocab_size}: {reason}",
                f"Set another {path}.vocab_size{fewer}",
            ) from None
        return {MODEL_FILE: model.getvalue()}

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def samples(self) -> bool:
        return self.params.sampling_alpha > 0.0

    def _encode(self, texts: Sequence[str], *, seed: int | None) -> list[Ids]:
        if seed is None:
            encoded = self._processor.encode(list(texts), num_threads=self.num_threads)
        else:
            encoded = self._sample(list(texts), seed=seed)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def _sample(self, texts: list[str], *, seed: int) -> list[list[int]]:
        """Draws segmentations with a generator that begins at `seed`.

        The library seeds a thread's generator when the thread first draws, so a new thread that encodes all texts in
        order gives the same ids for the same seed, whatever was drawn before.
        """
        p = self.params
        result: list[list[list[int]]] = []

        def draw() -> None:
            options = {"enable_sampling": True, "alpha": p.sampling_alpha, "nbest_size": p.sampling_nbest_size}
            result.append([self._processor.encode(text, **options) for text in texts])

        with _seed_lock:
            # The library takes the largest 32-bit number for "no seed".
            _library().set_random_generator_seed(seed & 0x7FFFFFFF)
            thread = threading.Thread(target=draw, name="sentencepiece-sampling")
            thread.start()
            thread.join()
        return result[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text; ids that the model's padded softmax may have beyond the vocabulary are passed over."""
        text: str = self._processor.decode([int(i) for i in ids if i < self._vocab_size])
        return text

    def _tag_id(self, tag: str) -> int:
        return self._tags[tag]


def _library() -> Any:
    return optional("sentencepiece", needed_for="SentencePiece tokenizers")
