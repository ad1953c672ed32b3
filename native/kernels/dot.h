// dot
#define DOT_TABLE {0}
