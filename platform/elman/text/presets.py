"""Presets: the field's customary corpora, where the hub keeps them, and how they are split.

`datasets` runs no loading scripts, so every entry points to Parquet files: the repository's own,
or those that the hub converted (revision ``refs/convert/parquet``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named corpus on the hub."""

    repository: str
    citation: str
    licence: str
    config: str | None = None
    revision: str | None = None
    column: str = "text"
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Official splits, by the hub's names, which are also ours."""
    byte_ranges: tuple[int, int] | None = None
    """Customary ends of train and validation in bytes of UTF-8, where the hub has one split."""
    rows_are_lines: bool = False
    """Whether a row is a line of running text; otherwise it is a document."""


PRESETS: dict[str, Preset] = {
    "tiny-shakespeare": Preset(
        repository="karpathy/tiny_shakespeare",
        revision="refs/convert/parquet",
        licence="public domain",
        citation="Karpathy (2015), The Unreasonable Effectiveness of Recurrent Neural Networks; char-rnn",
    ),
    "wikitext-2": Preset(
        repository="Salesforce/wikitext",
        config="wikitext-2-v1",
        rows_are_lines=True,
        licence="CC BY-SA 3.0",
        citation="Merity et al. (2016), Pointer Sentinel Mixture Models, arXiv:1609.07843",
    ),
    "wikitext-103": Preset(
        repository="Salesforce/wikitext",
        config="wikitext-103-v1",
        rows_are_lines=True,
        licence="CC BY-SA 3.0",
        citation="Merity et al. (2016), Pointer Sentinel Mixture Models, arXiv:1609.07843",
    ),
    "ptb": Preset(
        repository="ptb-text-only/ptb_text_only",
        config="penn_treebank",
        revision="refs/convert/parquet",
        column="sentence",
        rows_are_lines=True,
        licence="LDC user agreement for non-members",
        citation="Marcus et al. (1993), Building a Large Annotated Corpus of English; as cut by Mikolov et al. (2010)",
    ),
    "enwik8": Preset(
        repository="LTCB/enwik8",
        config="enwik8-raw",
        revision="refs/convert/parquet",
        splits=("train",),
        byte_ranges=(90_000_000, 95_000_000),
        licence="CC BY-SA 3.0",
        citation="Mahoney (2006), Large Text Compression Benchmark; split as by Graves (2013), arXiv:1308.0850, "
        "with validation and test of 5 MB each",
    ),
    "text8": Preset(
        repository="afmck/text8",
        licence="CC BY-SA 3.0",
        citation="Mahoney (2006), Large Text Compression Benchmark; split as by Mikolov et al. (2012)",
    ),
    "tinystories": Preset(
        repository="roneneldan/TinyStories",
        splits=("train", "validation"),
        licence="CDLA-Sharing 1.0",
        citation="Eldan & Li (2023), TinyStories, arXiv:2305.07759",
    ),
}
