"""How the documentation is built: sphinx-build -W -n docs OUT."""

project = "Outlast"
extensions = ["myst_parser"]
exclude_patterns = ["man"]
# Links to headings of other pages, as GitHub makes them.
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"page_width": "64rem", "description": "Jobs outlast their nodes"}
