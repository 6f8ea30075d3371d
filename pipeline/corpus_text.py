"""Read a user's own text into a corpus."""

from pathlib import Path

from gradiend_core.config.corpora import TextCorpus
from gradiend_core.config.section import read_section
from gradiend_core.corpus.texts import TEXTS, TEXTS_FILE
from gradiend_core.corpus.user_text import read_texts
from gradiend_core.tables import write_table
from pipeline.stage import Outputs, stage_parser


def main(argv: list[str]) -> None:
    """Write texts.parquet."""
    parser = stage_parser("corpus_text", __doc__)
    parser.add_argument("--text", required=True, type=Path, help="the file with the texts")
    parser.add_argument("--output", required=True, type=Path, help="folder of the corpus")
    arguments = parser.parse_args(argv)
    params = read_section(TextCorpus, arguments.params)
    with Outputs("corpus_text", arguments.manifest, params.model_dump(), [arguments.text]) as outputs:
        write_table(outputs.path(arguments.output / TEXTS_FILE), read_texts(arguments.text, params), TEXTS)
