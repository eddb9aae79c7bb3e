#: A level's number fits in a byte, of which one value is kept for "in no level that is loaded".
MAX_LEVELS = 255
