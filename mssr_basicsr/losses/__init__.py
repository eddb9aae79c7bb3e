"""Importing this package registers the plugin with BasicSR, even where the import hook is switched off."""

from mssr_basicsr.adapter.discovery import load_basicsr

load_basicsr()
