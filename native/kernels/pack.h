// pack
static int64_t pack_bytes(int type, int64_t rows, int64_t k) { (void)type; (void)rows; (void)k; return 0; }
