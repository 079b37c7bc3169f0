"""``devguard report``: what a run did on its GPUs, from its journals alone, as one page, as Markdown and as JSON.

run.py puts one run together: history.py finds the moments that matter, sites.py the lines of code, contexts.py and
arenas.py the rest; unseen.py says what no journal holds. page.py and markdown.py show it. Nothing here asks a driver.
"""
