"""Find the training rows and the neutral rows of a feature in a corpus."""

from pathlib import Path

from gradiend_core.config.datasets import Dataset
from gradiend_core.config.section import PARAMS_FILE, read_section
from gradiend_core.corpus.texts import TEXTS, TEXTS_FILE
from gradiend_core.data.generate import neutral_rows, training_rows
from gradiend_core.data.tables import NEUTRAL, NEUTRAL_FILE, TRAINING, TRAINING_FILE
from gradiend_core.tables import read_table, write_table
from pipeline.stage import Outputs, stage_parser


def main(argv: list[str]) -> None:
    """Write training.parquet and neutral.parquet."""
    parser = stage_parser("generate_data", __doc__)
    parser.add_argument("--corpus", required=True, type=Path, help="folder of the corpus")
    parser.add_argument("--output", required=True, type=Path, help="folder of the dataset")
    arguments = parser.parse_args(argv)
    params = read_section(Dataset, arguments.params)
    corpus = arguments.corpus / TEXTS_FILE
    with Outputs("generate_data", arguments.manifest, params.model_dump(), [corpus]) as outputs:
        texts = read_table(corpus, TEXTS)
        training = training_rows(texts, params, where=f"{PARAMS_FILE}: {arguments.params}")
        write_table(outputs.path(arguments.output / TRAINING_FILE), training, TRAINING)
        write_table(outputs.path(arguments.output / NEUTRAL_FILE), neutral_rows(texts, training, params), NEUTRAL)
