"""Write the demo corpus from a grammar and word lists."""

from pathlib import Path

from gradiend_core.config.corpora import GrammarCorpus
from gradiend_core.config.section import read_section
from gradiend_core.corpus.grammar import generate_sentences
from gradiend_core.corpus.texts import TEXTS, TEXTS_FILE
from gradiend_core.tables import write_table
from pipeline.stage import Outputs, stage_parser


def main(argv: list[str]) -> None:
    """Write texts.parquet."""
    parser = stage_parser("corpus_grammar", __doc__)
    parser.add_argument("--grammar", required=True, type=Path, help="folder with the grammar")
    parser.add_argument("--output", required=True, type=Path, help="folder of the corpus")
    arguments = parser.parse_args(argv)
    params = read_section(GrammarCorpus, arguments.params)
    with Outputs("corpus_grammar", arguments.manifest, params.model_dump(), [arguments.grammar]) as outputs:
        sentences = generate_sentences(arguments.grammar, max_size=params.max_size, seed=params.seed)
        write_table(outputs.path(arguments.output / TEXTS_FILE), sentences, TEXTS)
