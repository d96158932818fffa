module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <boost/asio/error.hpp>
#include <boost/system/system_error.hpp>

module cobuild.base;

namespace cobuild {

std::string_view version() noexcept { return COBUILD_VERSION; }

std::string_view to_string(errc kind) noexcept {
    switch (kind) {
        case errc::invalid: return "invalid";
        case errc::not_found: return "not_found";
        case errc::exists: return "exists";
        case errc::permission: return "permission";
        case errc::unauthorized: return "unauthorized";
        case errc::unavailable: return "unavailable";
        case errc::timed_out: return "timed_out";
        case errc::canceled: return "canceled";
        case errc::no_space: return "no_space";
        case errc::corrupt: return "corrupt";
        case errc::unsupported: return "unsupported";
        case errc::step_failed: return "step_failed";
        case errc::io: return "io";
        case errc::internal: break;
    }
    return "internal";
}

struct error::state {
    errc kind;
    std::string message;
    std::optional<source_location> where;
    std::optional<int> exit_code;
};

error::error(errc kind, std::string message) : state_(std::make_shared<state>(state{kind, std::move(message), {}, {}})) {}
error::error(const error&) = default;
error::error(error&& other) noexcept = default;
error& error::operator=(const error&) = default;
error& error::operator=(error&&) noexcept = default;
error::~error() = default;

errc error::kind() const noexcept { return state_->kind; }
const char* error::what() const noexcept { return state_->message.c_str(); }
const std::optional<source_location>& error::where() const noexcept { return state_->where; }
std::optional<int> error::exit_code() const noexcept { return state_->exit_code; }

error&& error::with(std::string_view context) && {
    auto next = std::make_shared<state>(*state_);
    next->message = cat(context, ": ", state_->message);
    state_ = std::move(next);
    return std::move(*this);
}

error&& error::at(source_location where) && {
    auto next = std::make_shared<state>(*state_);
    next->where = std::move(where);
    state_ = std::move(next);
    return std::move(*this);
}

error&& error::exited(int code) && {
    auto next = std::make_shared<state>(*state_);
    next->exit_code = code;
    state_ = std::move(next);
    return std::move(*this);
}

namespace {
errc kind_of_errno(int errnum) {
    switch (errnum) {
        case ENOENT: return errc::not_found;
        case EEXIST: return errc::exists;
        case EACCES:
        case EPERM:
        case EROFS: return errc::permission;
        case ENOSPC:
        case EDQUOT: return errc::no_space;
        case ECANCELED: return errc::canceled;
        case ETIMEDOUT: return errc::timed_out;
        default: return errc::io;
    }
}
}  // namespace

error os_error(int errnum, std::string_view what) { return error{kind_of_errno(errnum), cat(what, ": ", std::generic_category().message(errnum))}; }

void throw_errno(std::string_view what) {
    const int saved = errno;
    throw os_error(saved, what);
}

error describe(const std::exception_ptr& thrown) {
    try {
        std::rethrow_exception(thrown);
    } catch (const error& e) {
        return e;
    } catch (const boost::system::system_error& e) {
        if (e.code() == boost::asio::error::operation_aborted) return {errc::canceled, "canceled"};
        if (e.code().category() == boost::system::system_category() || e.code().category() == boost::system::generic_category())
            return {kind_of_errno(e.code().value()), e.code().message()};
        return {errc::io, e.code().message()};
    } catch (const std::system_error& e) {
        return {kind_of_errno(e.code().value()), e.code().message()};
    } catch (const std::bad_alloc&) {
        return {errc::internal, "out of memory"};
    } catch (const std::exception& e) {
        return {errc::internal, e.what()};
    } catch (...) {
        return {errc::internal, "an unknown exception"};
    }
}

void unique_fd::reset(int fd) noexcept {
    if (const int old = std::exchange(fd_, fd); old >= 0) ::close(old);
}

unique_fd unique_fd::duplicate() const {
    const int fd = ::fcntl(fd_, F_DUPFD_CLOEXEC, 3);
    if (fd < 0) throw_errno("duplicating a file descriptor");
    return unique_fd{fd};
}

}  // namespace cobuild
