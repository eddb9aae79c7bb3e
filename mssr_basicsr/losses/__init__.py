from mssr_basicsr.discovery import load_basicsr

load_basicsr()
