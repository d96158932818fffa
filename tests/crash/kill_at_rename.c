/* Preloaded into cobuild: after the COBUILD_KILL_AT-th rename of the process it dies by SIGKILL. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int after(int result) {
    static atomic_int renames;
    const char* at = getenv("COBUILD_KILL_AT");
    if (result == 0 && at != NULL && strcmp(program_invocation_short_name, "cobuild") == 0 && atomic_fetch_add(&renames, 1) + 1 == atoi(at)) kill(getpid(), SIGKILL);
    return result;
}

int rename(const char* from, const char* to) {
    int (*real)(const char*, const char*) = (int (*)(const char*, const char*))dlsym(RTLD_NEXT, "rename");
    return after(real(from, to));
}

int renameat(int from_dir, const char* from, int to_dir, const char* to) {
    int (*real)(int, const char*, int, const char*) = (int (*)(int, const char*, int, const char*))dlsym(RTLD_NEXT, "renameat");
    return after(real(from_dir, from, to_dir, to));
}

int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned int flags) {
    int (*real)(int, const char*, int, const char*, unsigned int) =
        (int (*)(int, const char*, int, const char*, unsigned int))dlsym(RTLD_NEXT, "renameat2");
    return after(real(from_dir, from, to_dir, to, flags));
}
