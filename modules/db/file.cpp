module;
#include <sys/statfs.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>

module cobuild.db;

import cobuild.base;

namespace cobuild::db {

std::string set_aside(const std::string& file) {
    const auto now = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    const auto aside = cat(file, ".damaged-", now, "-", random_id().substr(0, 4));
    if (::rename(file.c_str(), aside.c_str()) != 0) throw_errno(cat("cannot set the damaged database ", file, " aside"));
    ::rename((file + "-wal").c_str(), (aside + "-wal").c_str());
    ::unlink((file + "-shm").c_str());
    ::unlink((file + ".ok").c_str());
    return aside;
}

std::string_view network_file_system(long type) noexcept {
    switch (static_cast<unsigned long>(type) & 0xffffffffUL) {
        case 0x6969: return "NFS";
        case 0x517b: return "SMB";
        case 0xff534d42: return "CIFS";
        case 0xfe534d42: return "SMB2";
        case 0x01021997: return "9p";
        case 0x5346414f:
        case 0x6b414653: return "AFS";
        case 0x00c36400: return "Ceph";
        case 0x73757245: return "Coda";
        case 0x0bd00bd0: return "Lustre";
        case 0x564c: return "NCP";
        default: return {};
    }
}

std::string_view network_file_system(const std::string& directory) {
    struct statfs fs{};
    if (::statfs(directory.c_str(), &fs) != 0) throw_errno(cat("cannot look at ", directory));
    return network_file_system(static_cast<long>(fs.f_type));
}

}  // namespace cobuild::db
