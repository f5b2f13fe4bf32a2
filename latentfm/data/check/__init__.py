"""`latentfm data check`: what a run would make of a dataset, found by reading every picture once.

    findings.py     all of it, in one pass
    pictures.py     a picture: readable, odd, how it is cropped
    captions.py     tokens an encoder, and what is cut off
    duplicates.py   the same bytes, and nearly the same pictures
    tables.py       the findings as tables, for the terminal and the page
    page.py         the page with the crops as they will be trained
"""
