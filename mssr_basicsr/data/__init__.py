from mssr_basicsr.adapter.discovery import load_basicsr

load_basicsr()
