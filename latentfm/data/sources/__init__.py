"""Where pictures and captions come from, behind one interface: samples with a stable id, their captions, and the picture's bytes on demand.

    folder.py    pictures with .txt captions, or with metadata.jsonl / metadata.csv
    tables.py    parquet files
    shards.py    WebDataset tar archives, here or behind any fsspec URL
    hub.py       Hugging Face `datasets`: saved, hub, streaming
    several.py   which kind it is, and several sources as one
"""

from latentfm.data.sources.base import Columns, Dataset, Place, Problem, Sample, Share, summary
from latentfm.data.sources.folder import read_folder
from latentfm.data.sources.several import read_sources

__all__ = ["Columns", "Dataset", "Place", "Problem", "Sample", "Share", "read_folder", "read_sources", "summary"]
