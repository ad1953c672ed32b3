// rows
static void op_get_rows(worker *w, const pyg_step *s) { (void)w; (void)s; }
