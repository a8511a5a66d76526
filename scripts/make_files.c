/* make_files FOLDER COUNT LENGTH: the least that it takes to make files. One folder, opened once;
 * each file is made, written and closed, nothing is synced. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int folder = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    long count = atol(argv[2]);
    size_t length = strtoul(argv[3], NULL, 10);
    char *bytes = malloc(length), name[64];
    if (folder < 0 || !bytes) return 1;
    memset(bytes, 0x5a, length);
    for (long i = 0; i < count; i++) {
        snprintf(name, sizeof name, "layer.%ld.weight.npy", i);
        int file = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (file < 0 || write(file, bytes, length) != (ssize_t)length || close(file)) {
            perror(name);
            return 1;
        }
    }
    return 0;
}
