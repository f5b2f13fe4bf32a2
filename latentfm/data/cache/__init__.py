"""What was computed once, kept: entries by the hash of all they depend on, and values by the signatures of the files they were read from.

    store.py       the entries of a folder: found, read, written, noted as lost
    shard.py       one file of entries, and its table
    entries.py     chosen entries, read where they lie
    fill.py        what is missing, made by as many processes as there are; claims.py: which of them makes what
    trust.py       whose files are believed
    stat_cache.py  what was read from files that did not change
    processes.py   how the processes of one run divide their reading
"""
