"""A run folder as one HTML page, and several run folders side by side on another.

Pages are self-contained: no script, no font, no request. They read run folders through :mod:`fedsim.runs` only, so
they also work for a run that is still going on or that broke off.
"""
