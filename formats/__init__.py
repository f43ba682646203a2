"""
Other people's file formats, and what export.py writes in ours.

    llama.py       Hugging Face Llama folders, out and in
    gguf.py        GGUF files, out and in
    reference.py   torch checkpoints of the reference system, in
    release.py     a run of one checkpoint without its optimiser, out
    cards.py       README.md of the folders that are written
"""
