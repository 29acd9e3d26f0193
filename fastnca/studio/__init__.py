"""The studio: a page on which a sound lives. ``stage`` is what lives, ``session`` what learns and what is kept on disk,
``server`` what the page talks to, and ``page/`` the page."""
