"""The colours of reports: for each CSS variable its value in the light and in the dark theme."""

# Colours of charts. The light values must differ: svg.py recognizes colours by them.
CHART = {
    "text": ("#1b2430", "#e7ebf0"),
    "soft": ("#5b6675", "#9aa6b4"),
    "axis": ("#9ca3af", "#596473"),
    "grid": ("#e5e7eb", "#2a323d"),
    "band": ("#f1f4f8", "#222a34"),
    "card": ("#ffffff", "#1b212a"),
    # Series that colour-blind readers can distinguish (Okabe & Ito, 2008), lightened for
    # the dark theme.
    "c0": ("#4d4d4d", "#c3c9d1"),
    "c1": ("#0072b2", "#5ab4f0"),
    "c2": ("#e69f00", "#f0b73c"),
    "c3": ("#009e73", "#3ecb9d"),
    "c4": ("#d55e00", "#ff8f56"),
    "c5": ("#cc79a7", "#e6a3cb"),
    "c6": ("#56b4e9", "#8fd0f7"),
}

# Other colours of pages.
PAGE = {
    "ground": ("#f6f7f9", "#12161c"),
    "line": ("#e1e5ea", "#2d3642"),
    "good": ("#0b7a53", "#4cc79a"),
    "bad": ("#b3360b", "#ff9166"),
}
