// quantize
#define QUANTIZE_TABLE {0}
